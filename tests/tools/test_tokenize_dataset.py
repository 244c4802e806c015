import io
import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from taming_dist.data.codes import CodeDataset, CodeShard
from taming_dist.data.images import Preprocess
from taming_dist.data.manifest import resolve
from taming_dist.data.reader import Reader
from taming_dist.data.shards import ShardWriter
from taming_dist.errors import UserError
from taming_dist.models.modalities import RGB
from taming_dist.models.quantizers import VectorQuantizerConfig
from taming_dist.models.vqgan import VQGAN, VQGANConfig

TOOL = Path(__file__).parents[2] / "tools" / "tokenize_dataset.py"
tokenize = runpy.run_path(str(TOOL))["main"]
SAMPLES = 22


def tiny_vqgan(seed: int) -> VQGAN:
    torch.manual_seed(seed)
    config = VQGANConfig(
        quantizer=VectorQuantizerConfig(codes=16, dim=4, normalized=True),
        resolution=16,
        channels=32,
        multipliers=[1, 1],
        blocks=1,
        attention_resolutions=[],
        latent_channels=32,
    )
    return VQGAN(config).eval()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    tiny_vqgan(0).save_pretrained(folder)
    return folder


def write_images(folder: Path, bad: tuple[int, ...] = ()) -> Path:
    generator = np.random.default_rng(0)
    with ShardWriter(folder, "train", 8, classes=("a", "b", "c")) as writer:
        for number in range(SAMPLES):
            out = io.BytesIO()
            pixels = generator.integers(0, 256, (16, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(out, "PNG")
            data = b"broken" if number in bad else out.getvalue()
            writer.write(f"{number:04d}", {"png": data, "cls": b"%d" % (number % 3)})
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"))


def run(model: Path, shards: Path, out: Path, *options: str) -> None:
    arguments = ["--model", str(model), "--shards", str(shards), "--out", str(out)]
    tokenize([*arguments, "--shard-samples", "5", "--batch", "4", *options])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_codes_are_what_the_model_gives_for_each_image(
    model: Path, shards: Path, tmp_path: Path
) -> None:
    run(model, shards, tmp_path / "out", "--views", "flip")
    dataset = CodeDataset.open(str(tmp_path / "out"))
    vqgan = VQGAN.from_pretrained(model)
    assert dataset.tokenizer_fingerprint == vqgan.fingerprint
    assert (dataset.vocabulary, dataset.grid, dataset.views) == (16, (8, 8), 2)
    assert dataset.class_names == ("a", "b", "c")
    assert dataset.num_samples == 2 * SAMPLES
    codes, classes = dataset.take(np.arange(2 * SAMPLES))
    reader = Reader(resolve(str(shards)), Preprocess(16), micro_batch=SAMPLES)
    (batch,) = reader.epoch_batches()
    images = RGB().tensor(batch.images)
    with torch.inference_mode():
        expected = torch.stack([vqgan.encode(images), vqgan.encode(images.flip(-1))], dim=1)
    # Another batch size may round another way: at most a tie or two may fall differently.
    assert np.mean(codes == expected.flatten(0, 1).numpy()) > 0.999
    assert classes is not None
    assert classes.tolist() == [number // 2 % 3 for number in range(2 * SAMPLES)]
    assert len(np.unique(codes)) > 4


def test_bytes_do_not_depend_on_the_number_of_processes(
    model: Path, shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(model, shards, tmp_path / "one")
    for rank in (2, 0, 1):
        for name, value in (("RANK", rank), ("WORLD_SIZE", 3), ("LOCAL_RANK", 0)):
            monkeypatch.setenv(name, str(value))
        assert not (tmp_path / "three" / "manifest.json").exists()
        run(model, shards, tmp_path / "three")
    assert contents(tmp_path / "one") == contents(tmp_path / "three")
    assert len(contents(tmp_path / "one")) == 6


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
    assert "10 of 10 images" in capsys.readouterr().out
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
    one, other = (CodeDataset.open(str(tmp_path / p)).take(np.arange(SAMPLES))[0]
                  for p in ("fp32", "bf16"))  # fmt: skip
    assert np.mean(one == other) > 0.9


def test_codes_of_another_tokenizer_images_or_settings_are_refused(
    model: Path, shards: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    run(model, shards, out)
    before = contents(out)
    other = tmp_path / "other"
    tiny_vqgan(1).save_pretrained(other)
    theirs, mine = (VQGAN.from_pretrained(path).fingerprint for path in (model, other))
    with pytest.raises(UserError, match=f"{theirs}.*{mine}"):
        run(other, shards, out)
    with pytest.raises(UserError, match="of other images"):
        run(model, write_images(tmp_path / "images", bad=(1,)), out)
    with pytest.raises(UserError, match="fp32.*bf16"):
        run(model, shards, out, "--precision", "bf16")
    with pytest.raises(UserError, match=r"codes-train-00000\d\.tar, of another job"):
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
    for arguments, message in (
        ((tmp_path / "none", shards, out), "no such export|none"),
        ((tmp_path / "empty", shards, out), "empty is no export"),
        ((model, tmp_path / "none", out), "make_shards"),
        ((model, shards, tmp_path / "file"), "is a file"),
        ((model, shards, out, "--size", "17"), r"--size=17: .* multiple of 2"),
        ((model, shards, out, "--batch", "0"), "--batch"),
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
