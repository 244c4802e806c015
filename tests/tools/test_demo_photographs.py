import runpy
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from taming_dist.data.images import Preprocess
from taming_dist.data.reader import Reader, Reading
from taming_dist.errors import UserError
from taming_dist.formats.manifest import resolve

pytest.importorskip("skimage", reason="the demo's extra is not installed")
pytest.importorskip("sklearn", reason="the demo's extra is not installed")

TOOLS = Path(__file__).parents[2] / "tools"
tool = runpy.run_path(str(TOOLS / "demo_photographs.py"))
make_shards = runpy.run_path(str(TOOLS / "make_shards.py"))["main"]


@pytest.fixture(scope="module")
def crops(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("crops")
    tool["main"](["--out", str(out), "--size", "16", "--crops", "13"])
    return out


def test_every_photograph_gives_crops_and_label_maps_of_one_size(crops: Path) -> None:
    for split, count in (("train", 13), ("val", 2)):
        for kind, mode in (("images", "RGB"), ("segmentations", "L")):
            files = sorted((crops / split / kind).rglob("*.png"))
            assert len(files) == count * len(tool["PHOTOGRAPHS"])
            with Image.open(files[0]) as image:
                assert (image.size, image.mode) == ((16, 16), mode)


def test_validation_has_scales_that_training_never_has() -> None:
    least, (low, high) = tool["LEAST_SIDE"], tool["HELD_OUT"]
    for size in ((300, 200), (200, 300), (250, 250)):
        scales = {}
        for split in ("train", "val"):
            boxes = np.array([*tool["framings"](size, 0.5, split, 500, np.random.default_rng(0))])
            sides = boxes[:, 2:] - boxes[:, :2]
            assert boxes.min() >= 0
            assert (boxes[:, 2:] <= np.array(size) + 1e-9).all()
            assert np.allclose(sides[:, 0], sides[:, 1])
            scales[split] = (sides[:, 0] / min(size) - least) / (1 - least)
        assert scales["val"].min() > low
        assert scales["val"].max() < high
        assert ((scales["train"] < low) | (scales["train"] > high)).all()
        assert scales["train"].min() < 0.05
        assert scales["train"].max() > 0.95


def test_crops_of_a_wide_photograph_lie_around_its_subject() -> None:
    boxes = np.array([*tool["framings"]((600, 200), 0.3, "train", 500, np.random.default_rng(0))])
    middles = boxes[:, ::2].mean(axis=1)
    shift = tool["SHIFT"] * 200
    assert np.abs(middles - 180).max() <= shift + 1e-9
    assert np.ptp(middles) > 1.8 * shift


def test_a_second_run_has_nothing_to_do(crops: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tool["main"](["--out", str(crops), "--size", "16", "--crops", "13"])
    assert "nothing to do" in capsys.readouterr().out
    with pytest.raises(UserError, match="crops with other settings"):
        tool["main"](["--out", str(crops), "--size", "17", "--crops", "13"])


def test_the_crops_become_shards_with_class_and_label_map(crops: Path, tmp_path: Path) -> None:
    val = crops / "val"
    make_shards(
        ["--images", str(val / "images"), "--segmentations", str(val / "segmentations")]
        + ["--labels", "folders", "--out", str(tmp_path), "--prefix", "val"]
    )
    dataset = resolve(str(tmp_path))
    assert dataset.classes == tuple(sorted(tool["PHOTOGRAPHS"]))
    reading = Reading(Preprocess(16), micro_batch=8, columns=["seg.png"])
    for batch in Reader(dataset, reading).epoch_batches():
        assert batch.classes is not None
        assert int(batch.columns["seg.png"].max()) < tool["NUM_LABELS"]
