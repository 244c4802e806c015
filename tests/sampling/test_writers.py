"""What the formats hold: the same pictures, as those who read them expect."""

from collections.abc import Iterator
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from taming_dist.data.images import Preprocess
from taming_dist.data.reader import Reader, Reading
from taming_dist.engine.stopping import Stopped
from taming_dist.errors import UserError
from taming_dist.formats.manifest import resolve
from taming_dist.sampling.picture import Picture
from taming_dist.sampling.writers import WRITERS
from taming_dist.sampling.writers.png import encoded
from tests.sampling.conftest import Sample, record

CLASSES = [0, 1, 2, 0, 1, 2, 0]


def pictures(out: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path)) for path in sorted(out.glob("0*.png"))])


def test_a_picture_in_strips_is_the_same_picture() -> None:
    whole = torch.randint(0, 256, (3, 7, 5), dtype=torch.uint8)
    found = []
    for strips in ([whole], whole.split(3, dim=1)):
        file = BytesIO(encoded(Picture(0, 7, 5, iter(strips)), '{"seed": 3}'))
        with Image.open(file) as image:
            image.load()
            assert image.text == {"taming_dist": '{"seed": 3}'}
            found.append(np.asarray(image))
    assert np.array_equal(found[0], whole.permute(1, 2, 0).numpy())
    assert np.array_equal(found[1], found[0])


@pytest.mark.parametrize("format", ["png", "npz", "shards"])
def test_a_writer_that_is_stopped_in_the_middle_of_a_picture_leaves_nothing(
    tmp_path: Path, format: str
) -> None:
    def strips() -> Iterator[Tensor]:
        yield torch.zeros(3, 4, 8, dtype=torch.uint8)
        raise Stopped("SIGTERM")

    writer = WRITERS[format](tmp_path, tmp_path, "here-1", lambda index: "{}")
    with pytest.raises(Stopped):
        writer.write(0, [Picture(0, 8, 8, strips())])
    assert list(tmp_path.iterdir()) == []


def test_a_large_picture_is_the_same_in_tiles(sample: Sample) -> None:
    large = {"kind": "none", "size": "16x24", "n": 2}
    whole, tiled = (pictures(sample(f"{tile}", tile=tile, **large)) for tile in (0, 5))
    assert whole.shape == (2, 16, 24, 3)
    assert np.abs(whole.astype(int) - tiled).max() <= 1


def test_a_tile_is_for_large_pictures(sample: Sample) -> None:
    with pytest.raises(UserError, match="tile: 5 is for a size above the"):
        sample(tile=5)


def test_npz_is_what_evaluation_suites_read(sample: Sample) -> None:
    with np.load(sample("npz", format="npz") / "samples.npz", allow_pickle=False) as found:
        assert sorted(found.files) == ["arr_0", "arr_1"]
        assert found["arr_0"].dtype == np.uint8
        assert np.array_equal(found["arr_0"], pictures(sample("png")))
        assert found["arr_1"].dtype == np.int64
        assert found["arr_1"].tolist() == CLASSES


def test_npz_of_an_unconditional_model_has_no_classes(sample: Sample) -> None:
    with np.load(sample("npz", "none", format="npz") / "samples.npz") as found:
        assert found.files == ["arr_0"]


def test_shards_are_read_as_any_image_shards(
    sample: Sample, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("taming_dist.sampling.writers.shards.SHARD_IMAGES", 3)
    out = sample("shards", format="shards")
    dataset = resolve(str(out))
    assert dataset.samples_per_shard.tolist() == [3, 3, 1]
    assert dataset.columns == {"cls": 7, "png": 7}
    expected = pictures(sample("png"))
    reading = Reading(Preprocess(8), 7, columns=["image"], with_classes=True)
    batches = list(Reader(dataset, reading).epoch_batches(0, 7))
    assert [key for batch in batches for key in batch.keys] == [f"{k:06d}" for k in range(7)]
    assert np.concatenate([batch.classes for batch in batches]).tolist() == CLASSES
    found = np.concatenate([batch.columns["image"] for batch in batches])
    assert np.array_equal(np.moveaxis(found, 1, 3), expected)


@pytest.mark.parametrize("format", ["npz", "shards"])
def test_a_run_leaves_its_files_its_grid_and_its_record_only(sample: Sample, format: str) -> None:
    names = {
        "npz": ["samples.npz"],
        "shards": ["manifest.json", "samples-000000.tar", "samples-000000.tar.idx"],
    }
    out = sample(format=format)
    assert sorted(path.name for path in out.iterdir()) == sorted(
        [*names[format], "grid.png", "samples.json"]
    )
    assert {image["file"] for image in record(out)["images"]} == {
        names[format][-1 - (format == "shards")]
    }
    assert (out / "grid.png").read_bytes() == (sample("png") / "grid.png").read_bytes()


def test_a_run_of_another_format_replaces_a_finished_one_whole(sample: Sample) -> None:
    for format in ("shards", "npz", "png", "shards"):
        out = sample(format=format)
    assert sorted(path.name for path in out.iterdir()) == [
        "grid.png",
        "manifest.json",
        "samples-000000.tar",
        "samples-000000.tar.idx",
        "samples.json",
    ]


def test_a_format_that_is_not_known_is_refused(sample: Sample) -> None:
    with pytest.raises(UserError, match="format=gif: use png or npz or shards"):
        sample(format="gif")
