"""The sampling command on tiny exports: what it writes, and how it refuses."""

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from taming_dist.errors import UserError
from taming_dist.formats.png import write_png
from taming_dist.generation.generator import Generator
from taming_dist.generation.pictures import to_uint8
from taming_dist.models.prior.conditions import ClassCondition, Unconditional
from taming_dist.models.prior.transformer import Transformer, TransformerConfig
from taming_dist.models.quantizers import VectorQuantizerConfig
from taming_dist.models.vqgan import VQGAN
from taming_dist.sample import SampleConfig, main
from tests.tiny_models import tiny_config


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a VQGAN and two transformers on its codes: class-conditional and not."""
    folder = tmp_path_factory.mktemp("exports")
    torch.manual_seed(0)
    vqgan = VQGAN(tiny_config(VectorQuantizerConfig(codes=16, dim=4)))
    vqgan.save_pretrained(folder / "vqgan")
    for condition in (ClassCondition(3), Unconditional()):
        config = TransformerConfig(
            vocabulary=16,
            grid=[2, 3],
            layers=1,
            heads=2,
            width=8,
            condition=condition,
            vqgan_fingerprint=vqgan.fingerprint,
        )
        Transformer(config).save_pretrained(folder / condition.name)
    return folder


def config_for(exports: Path, out: Path, kind: str = "class", **settings: Any) -> SampleConfig:
    return SampleConfig(
        **{
            "transformer": str(exports / kind),
            "vqgan": str(exports / "vqgan"),
            "out": str(out),
            "n": 7,
        }
        | settings
    )


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def contents(out: Path) -> dict[str, bytes]:
    """The files of a run."""
    return {path.name: path.read_bytes() for path in out.iterdir()}


def record(out: Path) -> dict[str, Any]:
    return json.loads((out / "samples.json").read_text())


def test_images_a_sheet_and_a_record_are_written(exports: Path, tmp_path: Path) -> None:
    out = tmp_path / "new" / "samples"
    main(config_for(exports, out, seed=5, batch=3))
    names = [f"{index:06d}.png" for index in range(7)]
    assert sorted(os.listdir(out)) == [*names, "grid.png", "samples.json"]
    pair = [
        Transformer.from_pretrained(exports / "class"),
        VQGAN.from_pretrained(exports / "vqgan"),
    ]
    expected = to_uint8(Generator(*pair).sample(condition=[0, 1, 2, 0, 1, 2, 0], seed=5).images)
    for name, image in zip(names, expected.permute(0, 2, 3, 1).numpy(), strict=True):
        # Another batch may round differently: one level at most.
        assert np.abs(pixels(out / name).astype(int) - image).max() <= 1
    assert pixels(out / "grid.png").shape == (3 * 4 + 2 * 2, 3 * 6 + 2 * 2, 3)
    written = record(out)
    assert written["settings"]["seed"] == 5
    assert written["fingerprints"] == {
        "transformer": pair[0].fingerprint,
        "vqgan": pair[1].fingerprint,
    }
    assert [image["file"] for image in written["images"]] == names
    assert [image["class"] for image in written["images"]] == [0, 1, 2, 0, 1, 2, 0]


def test_one_class_may_be_asked_for(exports: Path, tmp_path: Path) -> None:
    main(config_for(exports, tmp_path, class_id=2, top_k=4, top_p=0.9))
    assert {image["class"] for image in record(tmp_path)["images"]} == {2}


def test_an_unconditional_model_needs_no_class(exports: Path, tmp_path: Path) -> None:
    main(config_for(exports, tmp_path, "none", n=5, size="4x6"))
    assert [image["class"] for image in record(tmp_path)["images"]] == [None] * 5
    assert pixels(tmp_path / "000004.png").shape == (4, 6, 3)


def test_images_may_be_larger_than_the_learned_size(exports: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"size": "8x10", "seed": 3, "temperature": 0.5, "batch": 2}
    main(config_for(exports, tmp_path, n=3, **settings))
    pair = [
        Transformer.from_pretrained(exports / "class"),
        VQGAN.from_pretrained(exports / "vqgan"),
    ]
    expected = Generator(*pair).sample(condition=[0, 1, 2], size=(8, 10), seed=3, temperature=0.5)
    for index, image in enumerate(to_uint8(expected.images).permute(0, 2, 3, 1).numpy()):
        assert np.abs(pixels(tmp_path / f"{index:06d}.png").astype(int) - image).max() <= 1
    pictures = [f"00000{index}.png" for index in range(3)]
    assert sorted(os.listdir(tmp_path)) == [*pictures, "grid.png", "samples.json"]


def test_a_second_run_replaces_the_first(exports: Path, tmp_path: Path) -> None:
    main(config_for(exports, tmp_path, seed=0))
    first = [pixels(tmp_path / f"{index:06d}.png") for index in range(7)]
    main(config_for(exports, tmp_path, seed=1))
    second = [pixels(tmp_path / f"{index:06d}.png") for index in range(7)]
    assert record(tmp_path)["settings"]["seed"] == 1
    assert any((one != two).any() for one, two in zip(first, second, strict=True))


def test_a_smaller_run_does_not_mix_with_a_larger_one(exports: Path, tmp_path: Path) -> None:
    main(config_for(exports, tmp_path))
    with pytest.raises(UserError, match=r"out: .*00000\d\.png is of an earlier, larger run"):
        main(config_for(exports, tmp_path, n=3))
    assert len(record(tmp_path)["images"]) == 7  # the larger one is left as it was


def test_pictures_that_no_run_has_named_are_left_alone(exports: Path, tmp_path: Path) -> None:
    theirs = ["1.png", "0007.png", "0000003.png", "2024.png"]
    for name in theirs:
        (tmp_path / name).write_text("a holiday")
    main(config_for(exports, tmp_path))
    assert all((tmp_path / name).read_text() == "a holiday" for name in theirs)


def test_a_run_that_ends_early_is_continued_by_the_same_command_alone(
    exports: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    main(config_for(exports, tmp_path / "undisturbed", seed=1, batch=2))
    main(config_for(exports, tmp_path / "out", seed=0, batch=2))
    written: list[int] = []

    def broken(*given: Any) -> None:
        if len(written) == 3:
            raise OSError(errno.EIO, "Input/output error")
        written.append(1)
        write_png(*given)

    with monkeypatch.context() as patched:
        patched.setattr("taming_dist.sampling.writers.png.write_png", broken)
        with pytest.raises(OSError, match="Input/output error"):
            main(config_for(exports, tmp_path / "out", seed=1, batch=2))
    names = ["000000.png", "000001.png", "000002.png"]
    assert sorted(os.listdir(tmp_path / "out")) == [".units", *names]
    with pytest.raises(UserError, match=r"unfinished run of other settings \(seed=1, here 2\)"):
        main(config_for(exports, tmp_path / "out", seed=2, batch=2))
    kept = (tmp_path / "out" / "000001.png").stat().st_mtime_ns
    main(config_for(exports, tmp_path / "out", seed=1, batch=2))
    assert (tmp_path / "out" / "000001.png").stat().st_mtime_ns == kept
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_stopped_while_models_are_loaded_says_so(
    exports: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    number: signal.Signals,
) -> None:
    monkeypatch.setenv("TAMING_DIST_END", str(tmp_path / "end"))
    monkeypatch.setattr(
        "taming_dist.sample.load_generator", lambda *_: os.kill(os.getpid(), number)
    )
    main(config_for(exports, tmp_path / "out"))
    said = f"stopped by {number.name}: nothing new was made, and the same command continues\n"
    assert capsys.readouterr().out == said
    assert json.loads((tmp_path / "end").read_text())["finished"] is False
    assert not (tmp_path / "out").exists()


def test_files_of_nobodys_are_not_replaced(exports: Path, tmp_path: Path) -> None:
    (tmp_path / "000003.png").write_text("a holiday")
    with pytest.raises(UserError, match=r"out: .*000003\.png is there already"):
        main(config_for(exports, tmp_path))
    assert os.listdir(tmp_path) == ["000003.png"]


def test_a_finished_run_is_not_made_again_unless_a_picture_is_missing(
    exports: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(config_for(exports, tmp_path))
    first = contents(tmp_path)
    made = (tmp_path / "000001.png").stat().st_mtime_ns
    main(config_for(exports, tmp_path))
    assert "is complete, nothing to do" in capsys.readouterr().out
    assert (tmp_path / "000001.png").stat().st_mtime_ns == made
    (tmp_path / "000002.png").unlink()
    main(config_for(exports, tmp_path))
    assert contents(tmp_path) == first


def test_progress_says_the_speed(
    exports: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(config_for(exports, tmp_path))
    printed = capsys.readouterr()
    assert "7/7 images, " in printed.err
    assert " images/s" in printed.err
    assert str(tmp_path / "grid.png") in printed.out


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        ("class", {"class_id": 3}, "class_id: 3 .* 0 to 2"),
        ("class", {"class_id": -1}, "class_id=-1: use a whole number from 0"),
        ("none", {"class_id": 0}, "class_id: this transformer is unconditional"),
        ("class", {"n": 0}, "n=0"),
        ("class", {"n": -4}, "n=-4"),
        ("class", {"batch": 0}, "batch=0"),
        ("class", {"size": "8x9"}, "size: .* 8x9 are not multiples .* give 8x8"),
        ("class", {"size": "2x8"}, "size: 2x8 is smaller than the 4x6"),
        ("class", {"window_step": 2}, "window_step: 2 is for a size above the 4x6"),
        ("class", {"size": "8 px"}, "size: '8 px' .* HEIGHTxWIDTH"),
        ("class", {"guidance": 3.0}, "guidance: 3.0"),
        ("class", {"top_p": 2.0}, "top_p=2.0"),
        ("absent", {}, "absent"),
        ("vqgan", {}, "vqgan is an export of a vqgan, but a transformer is needed"),
    ],
)
def test_what_cannot_be_sampled_is_refused_and_nothing_is_written(
    exports: Path, tmp_path: Path, kind: str, settings: dict[str, Any], message: str
) -> None:
    out = tmp_path / "out"
    with pytest.raises(UserError, match=message):
        main(config_for(exports, out, kind, **settings))
    assert not out.exists()


def test_a_folder_that_cannot_be_written_is_refused(exports: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="out: cannot write to"):
            main(config_for(exports, out))


def run_command(*overrides: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "taming_dist.sample", *overrides]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_the_command_samples(exports: Path, tmp_path: Path) -> None:
    given = [f"transformer={exports}/class", f"vqgan={exports}/vqgan", f"out={tmp_path}/out"]
    done = run_command(*given, "n=2", "class_id=1", "temperature=0.9", "top_k=5", "top_p=0.92")
    assert done.returncode == 0, done.stderr
    assert sorted(os.listdir(tmp_path / "out")) == [
        "000000.png",
        "000001.png",
        "grid.png",
        "samples.json",
    ]


@pytest.mark.slow
def test_the_command_refuses_in_one_line_with_exit_code_2(exports: Path, tmp_path: Path) -> None:
    given = [f"transformer={exports}/class", f"vqgan={exports}/vqgan", f"out={tmp_path}/out"]
    for overrides, named in (
        ([*given, "temprature=1"], "temprature"),
        ([*given, "class_id=9"], "class_id"),
        (given[:2], "out"),
    ):
        done = run_command(*overrides)
        assert done.returncode == 2
        assert named in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
    assert os.listdir(tmp_path) == []
