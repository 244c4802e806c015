"""A tokenizer judged by how well its codes can be predicted: real training by a tiny recipe."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from taming_dist.data.codes import CodeDataset
from taming_dist.engine.world import World
from taming_dist.errors import UserError
from taming_dist.evaluate import main
from taming_dist.evaluation.comparison import side_by_side
from taming_dist.evaluation.config import EvaluateConfig
from taming_dist.evaluation.probe_recipe import Probed, ProbeProtocol, ProbeRecipe, recipe_for
from taming_dist.evaluation.protocol import Measured
from taming_dist.formats.code_shards import CodeShard, write_codes_manifest
from taming_dist.models.quantizers import VectorQuantizerConfig
from taming_dist.models.vqgan import VQGAN, VQGANConfig
from taming_dist.probe import FOLDER, open_codes, open_real, protocol_of
from tests.evaluation.probe_worker import TINY

RANKS = Path(__file__).parents[1] / "engine" / "ranks.py"
VOCABULARY, SIZE, GRID = 16, 8, (4, 4)
TRAIN, VAL = 40, 13
ALONE = World(0, 1, 0, torch.device("cpu"))
FEW_CODES = 2  # that the codes of low entropy take


def write_codes(
    folder: Path,
    samples: int,
    codes: int = VOCABULARY,
    tokenizer: str = 64 * "a",
    images: str = "b",
    shards: int = 1,
    size: int = SIZE,
) -> None:
    """Code shards of a tokenizer that uses so many of its codes, alike."""
    folder.mkdir(parents=True)
    names = [f"codes-{number:06d}.tar" for number in range(shards)]
    for number, name in enumerate(names):
        drawn = np.random.default_rng([samples, number]).integers(0, codes, (samples, 1, *GRID))
        facts = {
            "vocab": VOCABULARY,
            "tokenizer": {"fingerprint": tokenizer},
            "source": {"fingerprint": 64 * images, "range": [0, samples], "bad": []},
            "preprocessing": {"size": size, "views": ["center"], "resize": "lanczos"},
        }
        keys = [f"{number}-{key}" for key in range(samples)]
        shard = CodeShard(facts, drawn.astype(np.uint16), np.arange(samples), keys)
        shard.save(folder / name)
    write_codes_manifest(folder, names, None, source_fingerprint=64 * images)


@pytest.fixture(scope="module")
def codes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer, real images and code shards: of it, of one with few codes, of other images, too
    few."""
    place = tmp_path_factory.mktemp("codes")
    torch.manual_seed(0)
    vqgan = VQGAN(
        VQGANConfig(
            quantizer=VectorQuantizerConfig(codes=VOCABULARY, dim=4),
            resolution=SIZE,
            channels=32,
            multipliers=[1, 1],
            blocks=1,
            attention_resolutions=[],
            latent_channels=4,
        )
    )
    vqgan.save_pretrained(place / "vqgan")
    pixels = np.random.default_rng(0).integers(0, 256, (9, SIZE, SIZE, 3), np.uint8)
    np.savez(place / "real.npz", pixels)
    np.savez(place / "three.npz", pixels[:3])
    for name, samples in (("train", TRAIN), ("val", VAL)):
        write_codes(place / "many" / name, samples, tokenizer=vqgan.fingerprint)
        write_codes(place / "few" / name, samples, FEW_CODES, tokenizer=64 * "c")
        write_codes(place / "elsewhere" / name, samples, images="d")
    write_codes(place / "short", TINY.batch - 1)
    write_codes(place / "shards", VAL, shards=2)
    write_codes(place / "large", VAL, tokenizer=vqgan.fingerprint, size=2 * SIZE)
    return place


def settings_for(codes: Path, kind: str, **more: Any) -> dict[str, Any]:
    names = {"train": "train", "data": "val"}
    return {key: str(codes / kind / name) for key, name in names.items()} | more


def of_samples(codes: Path) -> dict[str, Any]:
    """What asks for the distances of samples."""
    places = {"vqgan": str(codes / "vqgan"), "reference": str(codes / "real.npz")}
    return places | {"n": 7, "features": "random"}


def metrics(out: Path) -> dict[str, Any]:
    return json.loads((out / "metrics.json").read_text())


@pytest.fixture(scope="module")
def probes(codes: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the results `one` and `two`, on so many ranks, `few` and `stopped`."""
    place = tmp_path_factory.mktemp("probes")
    kinds = {"one": "many", "two": "many", "few": "few", "stopped": "many"}
    for name, kind in kinds.items():
        known = settings_for(codes, kind, stop=name == "stopped")
        if name in ("one", "two"):
            known |= of_samples(codes)
        (place / f"{name}.json").write_text(json.dumps(known))
    (place / "one" / FOLDER).mkdir(parents=True)
    (place / "one" / FOLDER / "of-one-that-was-killed").touch()
    worker = Path(__file__).with_name("probe_worker.py")
    words = [str(worker), str(place), *(f"{name}={1 + (name == 'two')}" for name in kinds)]
    environment = {name: value for name, value in os.environ.items() if name != "RANK"}
    done = subprocess.run(
        [sys.executable, str(RANKS), *words],
        env=environment | {"OMP_NUM_THREADS": "1", "TAMING_DIST_CACHE": str(place / "cache")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (place / "said").write_text(done.stdout)
    return place


@pytest.mark.slow
def test_two_ranks_find_the_figures_of_one(probes: Path) -> None:
    one, two = (metrics(probes / name) for name in ("one", "two"))
    assert one.keys() == two.keys()
    likelihoods, *_ = one["protocols"]
    for name, value in one.items():
        rounded = name in likelihoods["figures"]
        if rounded or not name.startswith("probe_"):  # samples part where a code does
            assert two[name] == (pytest.approx(value, rel=1e-3) if rounded else value), name
    named = [name for protocol in one["protocols"] for name in protocol["figures"]]
    assert sorted(named) == sorted(name for name in one if name.startswith("probe_"))


@pytest.mark.slow
def test_samples_are_compared_with_the_real_images_under_protocols_of_their_own(
    codes: Path, probes: Path
) -> None:
    found, few = metrics(probes / "one"), metrics(probes / "few")
    assert (found["samples"], found["sampling"]["seed"]) == (7, 0)
    assert found["vqgan_fingerprint"] == VQGAN.from_pretrained(codes / "vqgan").fingerprint
    assert "probe_fid" not in few
    protocols = {name: each for each in found["protocols"] for name in each["figures"]}
    assert set(protocols) >= {"probe_nll", "probe_fid", "probe_sfid", "probe_kid", "probe_recall"}
    known = protocols["probe_fid"]
    assert (known["images"], known["reference_images"], known["network"]) == (7, 9, "random")
    assert known["recipe"] == protocols["probe_nll"]["recipe"]
    assert len({protocols[f"probe_{name}"]["hash"] for name in ("nll", "fid", "sfid")}) == 3
    said = (probes / "said").read_text().splitlines()
    for name in ("nll", "fid"):
        end = f"protocol {protocols[f'probe_{name}']['hash']}"
        assert any(each.startswith(f"probe_{name} ") and each.endswith(end) for each in said), name


@pytest.mark.slow
def test_codes_of_lower_entropy_get_the_lower_likelihood_cost(probes: Path) -> None:
    many, few = (metrics(probes / name) for name in ("one", "few"))
    places = GRID[0] * GRID[1]
    # which is learned: an untrained one spreads its bets over all codes
    assert few["probe_nll"] < 0.7 * places * math.log(VOCABULARY) < many["probe_nll"]
    assert few["probe_unigram_entropy"] == pytest.approx(places * math.log(FEW_CODES), rel=0.05)
    bits = few["probe_nll"] / math.log(2)
    assert few["probe_bits_per_dim"] == pytest.approx(bits / (3 * SIZE**2))
    assert few["tokenizer"] != many["tokenizer"]


@pytest.mark.slow
def test_probes_of_two_tokenizers_stand_side_by_side(probes: Path) -> None:
    rows = side_by_side([probes / "one", probes / "few"])
    (name,) = (name for name in rows if name.startswith("probe_nll ("))
    assert None not in rows[name]


@pytest.mark.slow
def test_nothing_of_training_stays_and_a_signal_leaves_no_figures(probes: Path) -> None:
    assert "stopped by SIGTERM: nothing is measured yet" in (probes / "said").read_text()
    for name in ("one", "two", "few"):
        assert [file.name for file in (probes / name).iterdir()] == ["metrics.json"]
    assert list((probes / "stopped").iterdir()) == []
    assert json.loads((probes / "stopped.end").read_text())["reason"] == "stopped by SIGTERM"
    assert not (probes / "one.end").exists()  # checkpoints tell how far a run is, and this is none


def pair(codes: Path, kind: str) -> list[CodeDataset]:
    return [CodeDataset.open(str(codes / kind / name)) for name in ("train", "val")]


def probe_protocol(train: CodeDataset, val: CodeDataset, recipe: ProbeRecipe) -> ProbeProtocol:
    return Probed(Measured({}), train, recipe).protocol(protocol_of(val))


def test_a_protocol_is_of_recipe_and_images_and_not_of_the_tokenizer(codes: Path) -> None:
    many, few, elsewhere = (pair(codes, kind) for kind in ("many", "few", "elsewhere"))
    assert many[1].fingerprint != few[1].fingerprint
    known = probe_protocol(*many, TINY)
    assert probe_protocol(*few, TINY).hash == known.hash
    others = [probe_protocol(*elsewhere, TINY), probe_protocol(many[0], elsewhere[1], TINY)]
    others += [probe_protocol(elsewhere[0], many[1], TINY)]
    for name, value in vars(TINY).items():
        other = (*value, 0.5) if isinstance(value, tuple) else 2 * value
        others.append(probe_protocol(*many, dataclasses.replace(TINY, **{name: other})))
    hashes = {protocol.hash for protocol in (known, *others)}
    assert len(hashes) == 1 + len(others)


def test_a_part_of_the_shards_is_of_other_images_than_all_of_them(codes: Path) -> None:
    folder = codes / "shards"
    whole, listed, first, last = (
        CodeDataset.open(spec).origin
        for spec in (
            str(folder),
            str(folder / "codes-{000000..000001}.tar"),
            str(folder / "codes-000000.tar"),
            str(folder / "codes-000001.tar"),
        )
    )
    assert whole == listed
    assert whole.fingerprint == 64 * "b"
    assert len({each.fingerprint for each in (whole, first, last)}) == 3
    assert whole.views == first.views == "center"


def test_probes_of_two_recipes_are_refused_by_the_part_that_differs(
    codes: Path, tmp_path: Path
) -> None:
    for name, images in (("one", 160), ("other", 320)):
        measured = Measured({})
        recipe = dataclasses.replace(TINY, images=images)
        measured.add({"probe_nll": 1.0}, probe_protocol(*pair(codes, "many"), recipe))
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.json").write_text(json.dumps(measured.record()))
    with pytest.raises(UserError, match=r"differ in recipe.images \(160, 320\); evaluate both"):
        side_by_side([tmp_path / "one", tmp_path / "other"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train": None}, "train=... is missing: a probe is trained on"),
        ({"data": None}, "data=... is missing: a probe is trained on"),
        ({"train": "nothing"}, "train: .*nothing.*tokenize_dataset.py"),
        ({"train": "few/train"}, "train and data are codes of two tokenizers, c{64} and .{64}:"),
        ({"data": "large"}, "train and data differ in their image size, 8 and 16: tokenize both"),
        ({"train": "short"}, "train: 7 samples are fewer than a batch of a probe, 8"),
        ({"data": "short"}, "data: 7 samples are fewer than a batch of a probe, 8"),
        ({"model": "export"}, "model: a probe has no use for it"),
        ({"pictures": 0}, "pictures: a probe has no use for it"),
        ({"top_k": 100}, "top_k: a probe has no use for it"),
    ],
)
def test_mistakes_are_one_line(codes: Path, settings: dict[str, Any], message: str) -> None:
    known: dict[str, Any] = {"train": "many/train", "data": "many/val"} | settings
    for name in ("train", "data"):
        if known[name]:
            known[name] = str(codes / known[name])
    config = EvaluateConfig(probe=True, out="nowhere", **known)
    with pytest.raises(UserError, match=message):
        open_codes(config, TINY, ALONE)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"vqgan": ""}, "vqgan=... is missing: the export whose codes these are decodes samples"),
        ({"reference": None}, "reference=... is missing: the real images"),
        ({"features": "none"}, "features=none: samples are compared by features"),
        ({"n": 5}, "n: 5 images are too few, use 6 or more"),
        ({"reference": "three.npz"}, "reference: 3 images are too few, use 6 or more"),
        ({"reference": "nothing"}, "nothing"),
        ({"n": None}, "vqgan: it is for samples, whose FID is measured: give n="),
        ({"features": None}, "no Inception weights: .*run python tools/fetch_inception.py"),
    ],
)
def test_what_samples_lack_is_said_in_a_line_before_training(
    codes: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, Any],
    message: str,
) -> None:
    monkeypatch.setenv("TAMING_DIST_CACHE", str(tmp_path))
    if settings.get("reference"):
        settings = {"reference": str(codes / settings["reference"])}
    config = EvaluateConfig(probe=True, out="nowhere", **(of_samples(codes) | settings))
    with pytest.raises(UserError, match=message):
        open_real(config, pair(codes, "many")[0], ALONE)


def test_the_export_that_decodes_is_the_one_that_made_the_codes(codes: Path) -> None:
    config = EvaluateConfig(probe=True, out="nowhere", **of_samples(codes))
    with pytest.raises(UserError, match=r"vqgan: its fingerprint is .{64}, but .* of c{64}"):
        open_real(config, pair(codes, "few")[0], ALONE)


def test_a_recipe_has_the_sizes_that_are_asked_for_and_the_rate_of_its_width() -> None:
    plain = recipe_for(EvaluateConfig(out="nowhere"))
    small = recipe_for(
        EvaluateConfig(out="nowhere", probe_layers=4, probe_width=128, probe_images=20_480, seed=3)
    )
    assert (plain.layers, plain.width, plain.heads, plain.images) == (8, 512, 8, 256_000)
    assert (small.layers, small.width, small.heads, small.images) == (4, 128, 2, 20_480)
    assert small.lr == 4 * plain.lr
    assert small.warmup_images == 1_024
    assert small.seed == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"probe_width": 100}, "probe_width=100 is not a multiple of 64: use probe_width=128"),
        ({"probe_images": 1}, "probe_images=1 is not a multiple of 64: use probe_images=64"),
        ({"precision": "fp16"}, "precision=fp16"),
    ],
)
def test_sizes_that_make_no_recipe_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        recipe_for(EvaluateConfig(out="nowhere", **settings))


def test_ranks_that_cannot_share_a_batch_are_told_so(codes: Path) -> None:
    config = EvaluateConfig(probe=True, out="nowhere", **settings_for(codes, "many"))
    with pytest.raises(UserError, match="3 ranks cannot share its batches of 8 images equally"):
        open_codes(config, TINY, World(0, 3, 0, torch.device("cpu")))


@pytest.mark.parametrize(("key", "value"), [("train", "codes"), ("probe_images", 64)])
def test_what_a_probe_is_told_is_for_probes_only(tmp_path: Path, key: str, value: Any) -> None:
    settings = {"model": "export", "data": "codes", "out": str(tmp_path / "out"), key: value}
    with pytest.raises(UserError, match=f"{key}: it is for probe=true"):
        main(EvaluateConfig(**settings))
    assert not (tmp_path / "out").exists()
