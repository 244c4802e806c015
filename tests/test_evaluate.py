"""The evaluation command on tiny exports: its figures, its pictures, and how it refuses."""

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import taming_dist
from taming_dist.errors import UserError
from taming_dist.evaluate import EvaluateConfig, main
from taming_dist.evaluation import first_stage, second_stage
from taming_dist.evaluation.distribution import distances
from taming_dist.formats.code_shards import CodeShard, write_codes_manifest
from taming_dist.formats.manifest import resolve
from taming_dist.inception import inception
from taming_dist.models.prior.conditions import ClassCondition, Unconditional
from taming_dist.models.prior.transformer import Transformer, TransformerConfig
from taming_dist.models.quantizers import VectorQuantizerConfig
from taming_dist.models.vqgan import VQGAN
from tests.data.shard_files import writing_shards
from tests.tiny_models import tiny_config

SIZE, IMAGES, VOCABULARY, GRID = 64, 11, 16, (2, 3)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a VQGAN, two transformers on its codes, image shards and code shards."""
    folder = tmp_path_factory.mktemp("inputs")
    torch.manual_seed(0)
    vqgan = VQGAN(
        tiny_config(VectorQuantizerConfig(codes=VOCABULARY, dim=4), SIZE, multipliers=[1, 1, 1, 1])
    )
    vqgan.save_pretrained(folder / "vqgan")
    for condition in (ClassCondition(3), Unconditional()):
        config = TransformerConfig(
            vocabulary=VOCABULARY,
            grid=list(GRID),
            layers=1,
            heads=2,
            width=8,
            condition=condition,
            vqgan_fingerprint=vqgan.fingerprint,
        )
        Transformer(config).save_pretrained(folder / condition.name)
    write_images(folder / "images")
    write_codes(folder / "codes", vqgan.fingerprint)
    write_codes(folder / "other-codes", "f" * 64)
    write_codes(folder / "codes-without-classes", vqgan.fingerprint, classes=False)
    return folder


def write_images(folder: Path, bad: int | None = None) -> None:
    with writing_shards(folder, "val", 4) as write:
        for number in range(IMAGES):
            file = io.BytesIO()
            rng = np.random.default_rng(number)
            colours = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
            Image.fromarray(colours).resize((80, SIZE)).save(file, "PNG")
            data = b"no image" if number == bad else file.getvalue()
            write(f"{number:04d}", {"png": data})


def write_codes(folder: Path, fingerprint: str, classes: bool = True) -> None:
    folder.mkdir()
    codes = np.random.default_rng(0).integers(0, VOCABULARY // 2, (7, 1, *GRID), dtype=np.uint16)
    shard = CodeShard(
        {
            "vocab": VOCABULARY,
            "tokenizer": {"fingerprint": fingerprint},
            "source": {"fingerprint": "e" * 64, "range": [0, 7], "bad": []},
            "preprocessing": {"size": SIZE},
        },
        codes=codes,
        sources=np.arange(7),
        keys=[str(number) for number in range(7)],
        classes=np.arange(7, dtype=np.int32) % 3 if classes else None,
    )
    shard.save(folder / "codes-val-000000.tar")
    write_codes_manifest(folder, ["codes-val-000000.tar"], None)


def config_for(inputs: Path, out: Path, model: str, data: str, **settings: Any) -> EvaluateConfig:
    known = {"model": str(inputs / model), "data": str(inputs / data), "out": str(out)}
    return EvaluateConfig(**(known | {"lpips_net": "alex", "lpips_weights": "random"} | settings))


def metrics(out: Path) -> dict[str, Any]:
    return json.loads((out / "metrics.json").read_text())


def assert_same_figures(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert other[name] == (
            pytest.approx(value, rel=1e-5) if isinstance(value, float) else value
        )


def pixels(file: Path) -> np.ndarray:
    with Image.open(file) as image:
        return np.asarray(image)


def test_a_vqgan_gets_its_figures_and_pictures_whatever_the_batch(
    inputs: Path, tmp_path: Path
) -> None:
    for batch in (4, 11):
        config = config_for(inputs, tmp_path / str(batch), "vqgan", "images", batch=batch)
        main(config)
    found = metrics(tmp_path / "4")
    assert found["kind"] == "vqgan"
    assert found["images"] == IMAGES
    assert {"val_lpips", "val_lpips_mean_colour", "codebook_perplexity"} < found.keys()
    assert -1 < found["val_ssim"] < 1
    assert 0 < found["codebook_usage"] <= 1
    assert_same_figures(found, metrics(tmp_path / "11"))


def test_its_psnr_is_the_one_of_the_pictures_it_shows(inputs: Path, tmp_path: Path) -> None:
    main(config_for(inputs, tmp_path, "vqgan", "images"))
    folder = tmp_path / "images"
    shown, made = (
        np.stack([pixels(file) for file in sorted(folder.glob(f"*-{name}.png"))]) / 255
        for name in ("input", "reconstruction")
    )
    assert shown.shape == made.shape == (IMAGES, SIZE, SIZE, 3)
    psnr = -10 * np.log10(np.square(shown - made).mean())
    floor = -10 * np.log10(np.square(shown - shown.mean((1, 2), keepdims=True)).mean())
    assert metrics(tmp_path)["val_psnr"] == pytest.approx(psnr, abs=0.02)
    assert metrics(tmp_path)["val_psnr_mean_colour"] == pytest.approx(floor, abs=0.02)


def test_the_sheet_has_each_reconstruction_below_its_input(inputs: Path, tmp_path: Path) -> None:
    main(config_for(inputs, tmp_path, "vqgan", "images", pictures=3))
    sheet = pixels(tmp_path / "reconstructions.png")
    step = SIZE + 2
    assert sheet.shape == (SIZE + step, SIZE + 2 * step, 3)
    for number in range(3):
        for row, name in enumerate(("input", "reconstruction")):
            picture = pixels(tmp_path / "images" / f"{number:03d}-{name}.png")
            left, top = number * step, row * step
            assert np.array_equal(sheet[top : top + SIZE, left : left + SIZE], picture)


def test_results_of_an_earlier_evaluation_do_not_stay(inputs: Path, tmp_path: Path) -> None:
    main(config_for(inputs, tmp_path, "vqgan", "images"))
    main(config_for(inputs, tmp_path, "vqgan", "images", pictures=2))
    assert len(list((tmp_path / "images").iterdir())) == 4
    main(config_for(inputs, tmp_path, "vqgan", "images", pictures=0))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["images", "metrics.json"]


def test_an_image_that_cannot_be_read_is_counted(inputs: Path, tmp_path: Path) -> None:
    write_images(tmp_path / "images", bad=5)
    main(config_for(inputs, tmp_path / "out", "vqgan", str(tmp_path / "images")))
    found = metrics(tmp_path / "out")
    assert (found["images"], found["bad_images"]) == (IMAGES - 1, 1)


def test_features_compare_what_went_in_with_what_came_out(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(config_for(inputs, tmp_path, "vqgan", "images", features="random"))
    found, said = metrics(tmp_path), capsys.readouterr().out
    shown, made = (
        torch.from_numpy(np.stack([pixels(file) for file in sorted(files)])).permute(0, 3, 1, 2)
        for files in ((tmp_path / "images").glob(f"*-{n}.png") for n in ("input", "reconstruction"))
    )
    network = inception("random")
    for name, value in distances(network(made), network(shown)).items():
        assert found[f"r{name}"] == pytest.approx(value, rel=1e-4, abs=1e-7), name
    assert found["rfid"] > 0.01
    (protocol,) = (each for each in found["protocols"] if "rfid" in each["figures"])
    dataset = resolve(str(inputs / "images"))
    assert protocol["reference"] == dataset.fingerprint
    assert (protocol["images"], protocol["size"], protocol["network"]) == (IMAGES, SIZE, "random")
    assert (protocol["crop"], protocol["filter"], protocol["dtype"]) == (
        "centre",
        "lanczos",
        "uint8",
    )
    (line,) = (line for line in said.splitlines() if line.startswith("rfid "))
    assert line.endswith(f"protocol {protocol['hash']}")


def test_every_figure_has_a_protocol_and_other_images_another(inputs: Path, tmp_path: Path) -> None:
    write_images(tmp_path / "others", bad=5)
    for name, model, data in (
        ("one", "vqgan", "images"),
        ("other", "vqgan", str(tmp_path / "others")),
        ("tokens", "class", "codes"),
    ):
        main(config_for(inputs, tmp_path / name, model, data, pictures=0))
    hashes = []
    for name in ("one", "other", "tokens"):
        found = metrics(tmp_path / name)
        named = {figure: each["hash"] for each in found["protocols"] for figure in each["figures"]}
        figures = {key for key in found if key.startswith(("val_", "codebook_"))}
        assert figures <= named.keys() <= found.keys()
        assert found["version"] == taming_dist.__version__
        hashes.append(named)
    assert hashes[0]["val_psnr"] != hashes[0]["val_lpips"]  # which depends on its network
    assert hashes[0]["val_psnr"] == hashes[0]["codebook_usage"] != hashes[1]["val_psnr"]


@pytest.mark.parametrize("model", ["class", "none"])
def test_a_transformer_gets_its_figures_whatever_the_batch(
    model: str, inputs: Path, tmp_path: Path
) -> None:
    for batch in (3, 7):
        main(config_for(inputs, tmp_path / str(batch), model, "codes", batch=batch))
    found = metrics(tmp_path / "3")
    assert_same_figures(found, metrics(tmp_path / "7"))
    assert found["kind"] == "transformer"
    # Untrained, it spreads its bets over all codes, of which only half occur.
    assert found["val_nll"] == pytest.approx(np.log(VOCABULARY), abs=0.1)
    assert 0 < found["unigram_entropy"] <= np.log(VOCABULARY // 2)
    by_position = found["val_nll_by_position"]
    assert len(by_position) == GRID[0] * GRID[1]
    assert np.mean(by_position) == pytest.approx(found["val_nll"], abs=1e-4)
    bits = GRID[0] * GRID[1] * found["val_nll"] / np.log(2)
    assert found["val_bits_per_dim"] == pytest.approx(bits / (3 * SIZE * SIZE))


@pytest.mark.parametrize(
    ("model", "data", "settings", "message"),
    [
        ("vqgan", "images", {"size": 60}, "multiple of 8"),
        ("vqgan", "images", {"batch": 0}, "batch=0"),
        ("vqgan", "images", {"lpips_net": "resnet"}, "lpips_net=resnet: use vgg or alex or both"),
        ("vqgan", "images", {"lpips_weights": "none"}, "lpips_weights=none: use pretrained or"),
        ("vqgan", "codes", {}, "taming_dist.images"),
        ("vqgan", "nothing-*.tar", {}, "no file matches .*nothing"),
        ("images", "images", {}, "is no export"),
        ("vqgan", "images", {"features": "clip"}, "features=clip: use none or inception or"),
        ("class", "other-codes", {}, "trained on others, .*f{64}"),
        ("class", "codes-without-classes", {}, "have no classes"),
        ("class", "images", {}, "taming_dist.codes"),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_written(
    model: str, data: str, settings: dict[str, Any], message: str, inputs: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        main(config_for(inputs, tmp_path / "out", model, data, **settings))
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_a_file_is_refused_before_anything_is_measured(
    inputs: Path, tmp_path: Path
) -> None:
    (tmp_path / "out").touch()
    with pytest.raises(UserError, match="out: cannot write"):
        main(config_for(inputs, tmp_path / "out", "vqgan", "images"))


def test_the_command_writes_metrics_and_refuses_a_mistyped_key(
    inputs: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "taming_dist.evaluate", f"model={inputs / 'none'}"]
    command += [f"data={inputs / 'codes'}", f"out={tmp_path / 'out'}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "val_nll" in done.stdout
    assert metrics(tmp_path / "out")["kind"] == "transformer"
    assert "protocol" in done.stdout
    wrong = [*command, "bach=3"]
    refused = subprocess.run(wrong, env=environment, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: ")
    assert "bach" in refused.stderr
    assert refused.stderr.count("\n") == 1


def test_without_inception_weights_one_line_names_the_tool_that_fetches_them(
    inputs: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-m", "taming_dist.evaluate", f"model={inputs / 'vqgan'}"]
    command += [f"data={inputs / 'images'}", f"out={tmp_path / 'out'}", "lpips_weights=random"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TAMING_DIST_CACHE": str(tmp_path)}
    refused = subprocess.run(
        [*command, "features=inception"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert refused.returncode == 2
    (line,) = (line for line in refused.stderr.splitlines() if not line.startswith("LPIPS with"))
    assert line.startswith("error: no Inception weights: ")
    assert "python tools/fetch_inception.py" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
@pytest.mark.parametrize(("model", "data"), [("none", "codes"), ("vqgan", "images")])
def test_an_evaluation_that_is_asked_to_stop_ends_between_batches_and_begins_anew(
    inputs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
    model: str,
    data: str,
) -> None:
    def asked(batches: Iterator[Any], *_: Any) -> Iterator[Any]:
        yield next(batches)
        os.kill(os.getpid(), number)
        yield from batches

    monkeypatch.setenv("TAMING_DIST_END", str(tmp_path / "end"))
    config = config_for(inputs, tmp_path / "out", model, data, batch=2)
    handler = signal.signal(number, signal.default_int_handler)  # nohup may have it ignored
    try:
        with monkeypatch.context() as patch:
            for module in (first_stage, second_stage):
                patch.setattr(module, "with_progress", asked)
            main(config)
    finally:
        signal.signal(number, handler)
    said = f"stopped by {number.name}"
    assert capsys.readouterr().out.startswith(f"{said}: nothing is measured yet, and the same")
    assert json.loads((tmp_path / "end").read_text())["reason"] == said
    assert not (tmp_path / "out" / "metrics.json").exists()
    main(config)
    assert metrics(tmp_path / "out")
    assert not (tmp_path / "end").exists()
