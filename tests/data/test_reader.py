import gc
import io
import json
import threading
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from taming_dist.data.images import Preprocess, RandomCrop, RandomResizedCrop
from taming_dist.data.reader import Batch, ImagesConfig, Reader
from taming_dist.errors import UserError
from taming_dist.formats.manifest import resolve
from tests.data.damage import END, cut, encode
from tests.data.readers import reader_of
from tests.data.shard_files import writing_shards

Write = Callable[..., Path]
SAMPLES, LANES = 90, 8


def png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


def labels(number: int) -> bytes:
    return png(np.full((8, 12), number, dtype=np.uint8))


def depth(number: int) -> bytes:
    return png(np.full((8, 12), 600 * number, dtype=np.uint16))


def reader(folder: Path, **options: Any) -> Reader:
    defaults = {"seed": 5, "lanes": LANES, "block": 4, "micro_batch": 4, "threads": 2}
    preprocess = options.pop("preprocess", Preprocess(6, RandomCrop(), flip=True))
    return reader_of(resolve(str(folder)), preprocess, **(defaults | options))


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, write_images: Write) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    return write_images(folder, cls=lambda n: b"%d" % n, seg_png=labels, depth_png=depth)


def test_a_batch_holds_all_that_was_asked_for_of_each_sample(shards: Path) -> None:
    columns = ["depth.png", "image", "seg.png"]
    batch = next(reader(shards, columns=columns).epoch_batches(50))
    assert len(batch) == 4
    assert batch.columns["image"].dtype == torch.uint8
    assert batch.columns["image"].shape == (4, 3, 6, 6)
    assert batch.classes is not None
    assert batch.classes.tolist() == batch.ids.tolist()
    assert batch.keys == [f"{id:04d}" for id in batch.ids.tolist()]
    assert batch.columns["seg.png"][:, 0, 0].tolist() == batch.ids.tolist()
    assert batch.columns["depth.png"].shape == (4, 6, 6)
    assert torch.allclose(batch.columns["depth.png"][:, 5, 5], batch.ids.float() * 600 / 65535)


def test_what_nobody_asks_for_is_not_decoded(tmp_path: Path, write_images: Write) -> None:
    folder = write_images(tmp_path, seg_png=lambda n: b"no label map")
    batch = next(reader(folder).epoch_batches())
    assert list(batch.columns) == ["image"]


def test_an_image_that_nobody_asks_for_is_not_decoded_and_cuts_stay_the_same(
    tmp_path: Path, write_images: Write
) -> None:
    def slope(number: int) -> bytes:
        return png(np.arange(96, dtype=np.uint8).reshape(8, 12))

    whole = reader(write_images(tmp_path / "whole", seg_png=slope), columns=["image", "seg.png"])
    broken = write_images(tmp_path / "broken", bad=range(90), seg_png=slope)
    alone = reader(broken, columns=["seg.png"])
    for batch, expected in zip(alone.epoch_batches(), whole.epoch_batches(), strict=True):
        assert torch.equal(batch.columns["seg.png"], expected.columns["seg.png"])
        assert torch.equal(batch.crops, expected.crops)
    assert alone.num_bad == 0


@pytest.mark.parametrize("flip", [False, True])
def test_edges_and_the_low_resolution_are_cut_where_the_image_is(
    tmp_path: Path, write_images: Write, flip: bool
) -> None:
    rows, across = np.mgrid[0:64, 0:96].astype(np.uint8)
    image = np.stack([rows * 3, across * 2, rows + across], -1)
    small = np.asarray(Image.fromarray(image).resize((24, 16), Image.Resampling.BICUBIC))
    folder = write_images(
        tmp_path,
        samples=24,
        jpg=lambda n: png(image),  # comes before the .png that every sample has
        edges_png=lambda n: png(image[..., 0]),
        lr_png=lambda n: png(small),
    )
    preprocess = Preprocess(16, RandomResizedCrop((0.3, 0.8)), flip)
    source = reader(folder, preprocess=preprocess, columns=["lr", "image", "edges.png"])
    for batch in islice(source.batches(), 6):
        cut = batch.columns["image"].float()
        assert torch.equal(batch.columns["edges.png"].float(), cut[:, 0])
        low = batch.columns["lr"].float()
        assert low.shape == cut.shape
        inside = (..., slice(2, -2), slice(2, -2))
        assert (low[inside] - cut[inside]).abs().mean() < 4


def test_a_low_resolution_of_other_proportions_or_a_map_of_another_size_is_a_bad_sample(
    tmp_path: Path, write_images: Write
) -> None:
    def of_size(height: int, width: int) -> Callable[[int], bytes]:
        return lambda n: png(np.zeros((height, width, 3), dtype=np.uint8))

    found: list[dict[str, Any]] = []
    shards = write_images(tmp_path, lr_png=lambda n: of_size(4, 6 + 3 * (n == 5))(n))
    options: dict[str, Any] = {"on_bad": found.append, "max_bad_fraction": 1.0}
    list(reader(shards, columns=["image", "lr"], **options).epoch_batches())
    assert [record["key"] for record in found] == ["0005"]
    assert "a .lr.jpg of (4, 9) on an image of (8, 12)" in found[0]["error"]


def test_a_column_that_is_not_there_is_a_users_mistake(tmp_path: Path, write_images: Write) -> None:
    with pytest.raises(UserError, match=r"the model reads \.depth\.png, which 0 of 90 samples"):
        reader(write_images(tmp_path), columns=["depth.png"])


def test_evaluation_reads_every_image_once_over_all_ranks(shards: Path) -> None:
    ids = []
    for rank in range(4):
        batches = list(reader(shards, rank=rank, world_size=4).epoch_batches())
        assert len(batches[-1]) == len(range(rank, SAMPLES, 4)) % 4 or 4
        ids += [id for batch in batches for id in batch.ids.tolist()]
    assert sorted(ids) == list(range(SAMPLES))


@pytest.mark.parametrize(("world_size", "micro_batch"), [(1, 4), (2, 4), (4, 3)])
def test_a_bounded_evaluation_reads_the_same_images_on_any_ranks_in_any_batches(
    shards: Path, world_size: int, micro_batch: int
) -> None:
    ids = []
    for rank in range(world_size):
        source = reader(
            shards, rank=rank, world_size=world_size, micro_batch=micro_batch, most_evaluated=18
        )
        assert source.plan.num_evaluated == 18
        ids += [id for batch in source.epoch_batches() for id in batch.ids.tolist()]
    assert sorted(ids) == list(range(0, SAMPLES, SAMPLES // 18))


def test_evaluation_needs_no_lanes(shards: Path) -> None:
    assert sum(len(batch) for batch in reader(shards, lanes=256).epoch_batches()) == SAMPLES
    with pytest.raises(UserError, match=r"data\.lanes"):
        next(reader(shards, lanes=256).batches(0))


def test_without_a_class_for_everyone_there_are_no_classes(
    tmp_path: Path, write_images: Write
) -> None:
    assert next(reader(write_images(tmp_path)).epoch_batches()).classes is None


def test_classes_are_read_from_json_too(tmp_path: Path, write_images: Write) -> None:
    folder = write_images(tmp_path, json=lambda n: json.dumps({"label": n + 1}).encode())
    batch = next(reader(folder).epoch_batches())
    assert batch.classes is not None
    assert batch.classes.tolist() == (batch.ids + 1).tolist()


BROKEN_CLASSES = {
    b"cat": r"its \.cls is b'cat', which is not a whole number",
    b"1.0": r"its \.cls is b'1\.0', which is not a whole number",
    b"": r"its \.cls is b'', which is not a whole number",
    b"-1": "the class -1 is outside the range 0 to",
    b"8589934592": "the class 8589934592 is outside the range 0 to",
    b"9" * 5000: r"its \.cls is b'9",
}


@pytest.mark.parametrize("broken", BROKEN_CLASSES, ids=lambda broken: repr(broken[:12]))
def test_a_class_that_cannot_be_used_concerns_only_those_who_ask_for_classes(
    tmp_path: Path, write_images: Write, broken: bytes
) -> None:
    folder = write_images(tmp_path, 30, cls=lambda n: broken if n == 7 else b"1")
    message = (
        rf"train-000000\.tar: the class of the sample 0007 is invalid: {BROKEN_CLASSES[broken]}"
    )
    with pytest.raises(UserError, match=message):
        list(reader(folder).epoch_batches())
    source = reader(folder, with_classes=False)
    assert sum(len(batch) for batch in source.epoch_batches()) == 30
    assert (source.num_bad, source.has_classes) == (0, False)


@pytest.mark.parametrize("label", [1.5, None, "1", 2**33])
def test_a_class_in_json_that_is_no_class_id_is_named(
    tmp_path: Path, write_images: Write, label: Any
) -> None:
    labels = [2.0, 1, 2, label, 0]
    folder = write_images(tmp_path, 5, json=lambda n: json.dumps({"label": labels[n]}).encode())
    with pytest.raises(UserError, match="the class of the sample 0003 is invalid"):
        list(reader(folder).epoch_batches())


def test_evaluation_leaves_bad_samples_out(tmp_path: Path, write_images: Write) -> None:
    source = reader(write_images(tmp_path, bad=(0, 1, 2, 3, 50)), max_bad_fraction=1.0)
    ids = [id for batch in source.epoch_batches() for id in batch.ids.tolist()]
    assert ids == [id for id in range(SAMPLES) if id not in (0, 1, 2, 3, 50)]
    assert source.num_bad == 5


def test_too_many_bad_samples_end_the_run(tmp_path: Path, write_images: Write) -> None:
    source = reader(write_images(tmp_path, bad=(1, 2)))
    with pytest.raises(UserError, match=r"2 of \d+ samples .* data\.max_bad_fraction .*000[12] in"):
        list(source.epoch_batches())


def test_a_shard_cut_while_it_is_read_is_an_error(tmp_path: Path, write_images: Write) -> None:
    source = reader(write_images(tmp_path))
    with open(tmp_path / "train-000002.tar", "r+b") as file:
        file.truncate(4096)
    with pytest.raises(UserError, match=r"000002\.tar has 4096 bytes but .*verify_shards"):
        list(source.epoch_batches())


def test_a_damaged_header_costs_one_sample(tmp_path: Path, write_images: Write) -> None:
    path = write_images(tmp_path) / "train-000000.tar"
    with open(path, "r+b") as file:
        file.seek(10)
        file.write(b"\xff")
    records: list[dict[str, Any]] = []
    source = reader(tmp_path, on_bad=records.append)
    assert sum(len(batch) for batch in source.epoch_batches()) == SAMPLES - 1
    assert "checksum" in records[0]["error"]


def reader_threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("reader")}


def test_threads_end_when_the_iterator_is_closed_or_dropped(shards: Path) -> None:
    before = reader_threads()  # another test's reader may still be waiting for its file
    closed, dropped = reader(shards).epoch_batches(), reader(shards).epoch_batches()
    assert isinstance(next(closed), Batch)
    assert isinstance(next(dropped), Batch)
    assert reader_threads() - before
    closed.close()  # type: ignore[attr-defined]
    del dropped
    gc.collect()
    assert not reader_threads() - before


def test_the_state_tells_whether_a_run_can_go_on(
    shards: Path, tmp_path: Path, write_images: Write
) -> None:
    source = reader(shards)
    state = json.loads(json.dumps(source.plan.state(160)))
    assert state["samples"] == 160
    source.plan.check_state(state)
    for options, message in (
        ({"seed": 6}, r"run\.seed is 6 .* started with 5"),
        ({"lanes": 16}, r"data\.lanes is 16 .* 8"),
        ({"block": 5}, r"data\.block"),
    ):
        with pytest.raises(UserError, match=message):
            reader(shards, **options).plan.check_state(state)
    with pytest.raises(UserError, match=r"data\.train"):
        reader(write_images(tmp_path)).plan.check_state(state)


def test_a_position_that_ranks_cannot_share_is_an_error(shards: Path) -> None:
    with pytest.raises(UserError, match=r"data\.global_batch"):
        next(reader(shards, world_size=4).batches(6))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"crop": "middle"}, r"data\.crop is 'middle' but must be random, center, resized"),
     ({"crop": "resized", "crop_scale": [0.5]}, r"data\.crop_scale=\[0\.5\]: use 2 numbers"),
     ({"crop": "resized", "crop_ratio": [2.0, 1.0]}, r"data\.crop_ratio is \[2\.0, 1\.0\]")],
)  # fmt: skip
def test_a_crop_that_does_not_exist_is_a_users_mistake(options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ImagesConfig(size=8, **options).preprocess()


@pytest.mark.parametrize("key", ["micro_batch", "threads"])
def test_a_number_below_one_is_a_users_mistake(shards: Path, key: str) -> None:
    with pytest.raises(UserError, match=rf"data\.{key} is 0"):
        reader(shards, **{key: 0})


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Whole JPEGs, one cut in half with an end mark, and one with filling before its end mark."""
    folder, whole = tmp_path_factory.mktemp("damaged"), encode("JPEG")
    with writing_shards(folder, "train", 12) as write:
        for number in range(12):
            files = {3: cut(whole), 5: whole[:-2] + bytes(5) + END}
            write(f"{number:04d}", {"jpg": files.get(number, whole)})
    return folder


@pytest.mark.parametrize("choice", ["skip", "use"])
def test_damaged_pictures_are_left_out_or_used_and_counted_either_way(
    damaged: Path, choice: str
) -> None:
    told: list[dict[str, Any]] = []
    options: dict[str, Any] = {"on_bad": told.append, "damaged": choice, "lanes": 4}
    source = reader(damaged, preprocess=Preprocess(144), max_bad_fraction=0.001, **options)
    found = [key for batch in source.epoch_batches() for key in batch.keys]
    assert ("0003" in found) == (choice == "use")
    assert {f"{number:04d}" for number in range(12)} - set(found) <= {"0003"}
    (record,) = told
    assert record["key"] == "0003"
    assert record["error"] == "the image is damaged: premature end of data segment"
    assert record.get("used", False) == (choice == "use")
    used = int(choice == "use")
    assert source.counts() == {"bad_samples": 1 - used, "damaged_used": used}


def test_what_is_used_of_a_damaged_picture_are_its_pixels(damaged: Path) -> None:
    used = reader(damaged, preprocess=Preprocess(144), micro_batch=1, damaged="use", on_bad=id)
    images = [batch.columns["image"] for batch in used.epoch_batches()]
    assert torch.equal(images[3][..., :16, :], images[4][..., :16, :])
    assert not torch.equal(images[3], images[4])


def test_training_replaces_damaged_pictures_or_uses_them(damaged: Path) -> None:
    for choice, bad, used in (("skip", 1, 0), ("use", 0, 1)):
        options = {"damaged": choice, "lanes": 4, "block": 3, "on_bad": lambda record: None}
        source = reader(damaged, preprocess=Preprocess(16), micro_batch=4, **options)
        found = [key for batch in islice(source.batches(), 3) for key in batch.keys]
        assert ("0003" in found) == bool(used)
        counted = source.counts()
        assert (counted["bad_samples"], counted["damaged_used"]) == (bad, used)


def test_another_choice_for_damaged_pictures_is_one_line(damaged: Path) -> None:
    with pytest.raises(UserError, match="data.damaged is 'keep' but must be skip or use"):
        reader(damaged, damaged="keep")
