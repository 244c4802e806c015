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


def test_training_and_validation_parts_share_no_pixel_and_hold_a_crop() -> None:
    for shape in ((300, 200), (200, 300), (250, 250)):
        numbers = np.arange(shape[0] * shape[1])
        pixels = np.stack([numbers % 256, numbers // 256, 0 * numbers], axis=-1)
        photo = Image.fromarray(pixels.reshape(*shape, 3).astype(np.uint8))
        parts = tool["cut_in_two"](photo, 16)
        seen = [
            {tuple(pixel) for pixel in np.asarray(part.photo).reshape(-1, 3).tolist()}
            for part in (parts["train"], parts["val"])
        ]
        assert seen[0] & seen[1] == set()
        assert len(seen[0] | seen[1]) == shape[0] * shape[1]
        for part in parts.values():
            assert min(part.photo.size) >= part.short_side / tool["ZOOMS"][0]


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
