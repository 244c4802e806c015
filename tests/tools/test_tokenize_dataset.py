import dataclasses
import io
import json
import os
import runpy
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from taming_dist.data.codes import CodeDataset
from taming_dist.data.images import Preprocess
from taming_dist.data.reader import Reader, Reading
from taming_dist.errors import UserError
from taming_dist.formats.code_shards import CodeShard, write_codes_manifest
from taming_dist.formats.manifest import resolve
from taming_dist.models.modalities import RGB
from taming_dist.models.prior.transformer import TransformerConfig
from taming_dist.models.quantizers import MultiScaleConfig, VectorQuantizerConfig
from taming_dist.models.vqgan import VQGAN
from tests.data.shard_files import writing_shards
from tests.tiny_models import tiny_config

TOOL = Path(__file__).parents[2] / "tools" / "tokenize_dataset.py"
tokenize = runpy.run_path(str(TOOL))["main"]
SAMPLES = 22


def tiny_vqgan(seed: int) -> VQGAN:
    torch.manual_seed(seed)
    config = tiny_config(
        VectorQuantizerConfig(codes=16, dim=4, normalized=True), 16, latent_channels=32
    )
    return VQGAN(config).eval()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    tiny_vqgan(0).save_pretrained(folder)
    return folder


def write_images(
    folder: Path, bad: tuple[int, ...] = (), classes: Mapping[int, bytes | None] | None = None
) -> Path:
    generator = np.random.default_rng(0)
    with writing_shards(folder, "train", 8, classes=("a", "b", "c")) as write:
        for number in range(SAMPLES):
            out = io.BytesIO()
            pixels = generator.integers(0, 256, (16, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(out, "PNG")
            data = b"broken" if number in bad else out.getvalue()
            cls = (classes or {}).get(number, b"%d" % (number % 3))
            write(f"{number:04d}", {"png": data} | ({} if cls is None else {"cls": cls}))
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


def run(model: Path, shards: Path, out: Path, *options: str) -> None:
    arguments = ["--model", str(model), "--shards", str(shards), "--out", str(out)]
    tokenize([*arguments, "--shard-samples", "5", "--batch", "4", *options])


def contents(folder: Path) -> dict[str, bytes]:
    """Shards and manifest; records and reports are not part of the data set."""
    names = [*sorted(folder.glob("*.tar")), folder / "manifest.json"]
    return {path.name: path.read_bytes() for path in names if path.exists()}


def test_codes_are_what_the_model_gives_for_each_image(
    model: Path, shards: Path, tmp_path: Path
) -> None:
    run(model, shards, tmp_path / "out", "--views", "flip")
    dataset = CodeDataset.open(str(tmp_path / "out"))
    vqgan = VQGAN.from_pretrained(model)
    assert dataset.tokenizer_fingerprint == vqgan.tokenizer_fingerprint
    assert (dataset.vocabulary, dataset.grid, dataset.views) == (16, (8, 8), 2)
    assert dataset.class_names == ("a", "b", "c")
    assert dataset.num_samples == 2 * SAMPLES
    rows = dataset.take(np.arange(2 * SAMPLES), ["cls"])
    reader = Reader(resolve(str(shards)), Reading(Preprocess(16), SAMPLES))
    (batch,) = reader.epoch_batches()
    images = RGB().tensor(batch.columns["image"])
    with torch.inference_mode():
        expected = torch.stack([vqgan.encode(images), vqgan.encode(images.flip(-1))], dim=1)
    # Another batch size may round another way: at most a tie or two may fall differently.
    assert np.mean(rows["codes"] == expected.flatten(0, 1).numpy()) > 0.999
    assert rows["cls"].tolist() == [number // 2 % 3 for number in range(2 * SAMPLES)]
    assert len(np.unique(rows["codes"])) > 4


def test_views_are_cut_from_the_image_that_they_belong_to(
    model: Path, shards: Path, tmp_path: Path
) -> None:
    run(model, shards, tmp_path / "ten", "--views", "ten-crop", "--size", "10")
    for name in ("one", "other"):
        run(model, shards, tmp_path / name, "--views", "random", "--crops", "3", "--seed", "5")
    assert contents(tmp_path / "one") == contents(tmp_path / "other")
    ten, three = (CodeDataset.open(str(tmp_path / name)) for name in ("ten", "one"))
    assert (ten.views, ten.grid, three.views) == (10, (5, 5), 3)
    assert three.num_samples == 3 * SAMPLES
    facts = CodeShard.open(tmp_path / "one" / "codes-train-000000.tar").facts
    assert facts["preprocessing"]["square"] == 18
    assert facts["preprocessing"]["views"][2] == "random 2 of seed 5"


def test_batch_sizes_from_1_to_64_give_the_same_codes_in_fp32(
    model: Path, shards: Path, tmp_path: Path
) -> None:
    for batch in ("1", "3", "16", "64"):
        run(model, shards, tmp_path / batch, "--batch", batch, "--shard-samples", "20")
    for batch in ("3", "16", "64"):
        assert contents(tmp_path / batch) == contents(tmp_path / "1")


def test_an_interrupted_run_goes_on_and_a_finished_one_has_nothing_to_do(
    model: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    run(model, shards, out)
    whole = contents(out)
    (out / "manifest.json").unlink()
    (out / "codes-train-000001.tar").unlink()
    path = out / "codes-train-000003.tar"
    path.write_bytes(path.read_bytes()[:-600])
    kept = (out / "codes-train-000000.tar").stat().st_mtime_ns
    run(model, shards, out)
    assert contents(out) == whole
    assert (out / "codes-train-000000.tar").stat().st_mtime_ns == kept
    assert "22 of 22 images" in capsys.readouterr().out
    run(model, shards, out)
    assert "nothing to do" in capsys.readouterr().out


def test_a_bad_image_has_no_row_and_shifts_nobody(
    model: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = (0, 7, 10, 11, 12, 13, 14)  # the third range has no image at all
    run(model, shards, tmp_path / "good", "--batch", "1")
    run(model, write_images(tmp_path / "images", bad), tmp_path / "out", "--batch", "1")
    assert "15 images in 5 code shards, 7 left out" in capsys.readouterr().out
    for number in range(5):
        name = f"codes-train-{number:06d}.tar"
        good, found = (
            CodeShard.open(tmp_path / "good" / name),
            CodeShard.open(tmp_path / "out" / name),
        )
        kept = [row for row, source in enumerate(good.sources) if source not in bad]
        assert found.sources.tolist() == good.sources[kept].tolist()
        assert np.array_equal(found.codes, good.codes[kept])
        assert len(found.facts["source"]["bad"]) == len(good.codes) - len(kept)
    assert CodeDataset.open(str(tmp_path / "out")).num_samples == 15


def test_bf16_gives_nearly_the_same_codes(model: Path, shards: Path, tmp_path: Path) -> None:
    for precision in ("fp32", "bf16"):
        run(model, shards, tmp_path / precision, "--precision", precision)
    one, other = (CodeDataset.open(str(tmp_path / p)).take(np.arange(SAMPLES))["codes"]
                  for p in ("fp32", "bf16"))  # fmt: skip
    assert np.mean(one == other) > 0.9
    report = json.loads((tmp_path / "bf16" / "report.json").read_text())
    assert 0.9 < report["codes_equal_to_fp32"] <= 1


def test_codes_of_another_tokenizer_images_or_settings_are_refused(
    model: Path, shards: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run(model, shards, out)
    before = contents(out)
    other = tmp_path / "other"
    tiny_vqgan(1).save_pretrained(other)
    theirs, mine = (VQGAN.from_pretrained(path).tokenizer_fingerprint for path in (model, other))
    with pytest.raises(UserError, match=f"{theirs}.*{mine}"):
        run(other, shards, out)
    with pytest.raises(UserError, match=r"holds codes of other images.* but --shards has"):
        run(model, write_images(tmp_path / "images", bad=(1,)), out)
    with pytest.raises(UserError, match="fp32.*bf16"):
        run(model, shards, out, "--precision", "bf16")
    with pytest.raises(UserError, match=r"codes-train-00000\d\.tar from another job"):
        run(model, shards, out, "--prefix", "codes-val")
    with pytest.raises(UserError, match="images.v1 shards"):
        run(model, shards, shards)
    (out / "manifest.json").unlink()
    with pytest.raises(UserError, match=f"{theirs}.*{mine}"):
        run(other, shards, out)
    assert before.items() >= contents(out).items()


def test_mistakes_are_found_before_anything_is_written(
    model: Path, shards: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    scales = tmp_path / "scales"
    VQGAN(tiny_config(MultiScaleConfig(codes=4, dim=2, scales=[1, 4]))).save_pretrained(scales)
    for arguments, message in (
        ((tmp_path / "none", shards, out), "no such export|none"),
        ((scales, shards, out, "--size", "16"), r"--size=16: .*scales=\[1, 4\].*8 x 8 latents"),
        ((tmp_path / "empty", shards, out), "empty is no export"),
        ((model, tmp_path / "none", out), "make_shards"),
        ((model, shards, tmp_path / "file"), "is a file"),
        ((model, shards, out, "--size", "17"), r"--size=17: .* multiple of 2"),
        ((model, shards, out, "--batch", "0"), "--batch"),
        ((model, shards, out, "--prefix", "a/b"), "--prefix: 'a/b' is invalid: use letters"),
        ((model, shards, out, "--prefix", "../x"), r"--prefix: '\.\./x' is invalid: use letters"),
        ((model, shards, out, "--stale-after", "nan"), "--stale-after: 'nan' is invalid"),
    ):
        with pytest.raises(UserError, match=message):
            run(*arguments)
        assert not out.exists()


def test_it_runs_as_a_script_and_ends_with_code_2_on_a_mistake(model: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(TOOL), "--model", str(model), "--shards", "none", "--out", "x"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, check=False, env=dict(os.environ)
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("broken", [b"8589934592", b"-1", b"cat", b"1.0", b""])
def test_a_class_that_cannot_be_used_names_its_sample_and_leaves_nothing_half_written(
    model: Path, tmp_path: Path, broken: bytes
) -> None:
    shards = write_images(tmp_path / "images", classes={13: broken})
    out = tmp_path / "out"
    with pytest.raises(UserError, match="the class of the sample 0013 .*--no-classes"):
        run(model, shards, out)
    # What was finished before is whole: it holds no image of that class.
    names = {path.name for path in out.iterdir()}
    assert names <= {".parts", "codes-train-000000.tar", "codes-train-000001.tar"}
    with pytest.raises(UserError, match="holds codes with the preprocessing"):
        run(model, shards, out, "--no-classes")
    run(model, shards, tmp_path / "plain", "--no-classes")
    assert not CodeDataset.open(str(tmp_path / "plain")).classes_present


def test_images_without_a_class_among_others_are_counted_before_the_codes_lose_theirs(
    model: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    some = write_images(tmp_path / "images", classes={3: None, 13: None})
    run(model, some, tmp_path / "codes")
    said = f"without a class: 2 of {SAMPLES} images, so the codes get none"
    assert said in capsys.readouterr().out
    assert not CodeDataset.open(str(tmp_path / "codes")).classes_present
    run(model, some, tmp_path / "plain", "--no-classes")
    run(model, shards, tmp_path / "all")
    assert "without a class" not in capsys.readouterr().out


def test_classes_of_codes_that_were_written_before_they_had_a_range_are_named(
    model: Path, shards: Path, tmp_path: Path
) -> None:
    run(model, shards, tmp_path / "out", "--shard-samples", "30")
    name = "codes-train-000000.tar"
    shard = CodeShard.open(tmp_path / "out" / name, in_memory=True)
    assert shard.classes is not None
    classes = shard.classes.copy()
    classes[5] = -1
    dataclasses.replace(shard, classes=classes).save(tmp_path / "out" / name)
    write_codes_manifest(tmp_path / "out", [name], ("a", "b", "c"))
    codes = CodeDataset.open(str(tmp_path / "out"))
    config = TransformerConfig(16, [8, 8], condition="class", layers=1, heads=2, width=8)
    with pytest.raises(UserError, match=r"the class -1 is outside the range .* \(the image 0005\)"):
        config.fitted(codes, "out")
    assert dataclasses.replace(config, condition="none").fitted(codes, "out").vocabulary == 16
