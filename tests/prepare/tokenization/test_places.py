"""Where views lie in their images, and objects in views: tokenized, stored, read."""

import io
import json
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from taming_dist.data.codes import CodeDataset, CodeReader
from taming_dist.engine.workers import Worker
from taming_dist.errors import UserError
from taming_dist.prepare.tokenization.work import tokenize
from tests.data.shard_files import writing_shards

TOOLS = Path(__file__).parents[3] / "tools"
TOOL = runpy.run_path(str(TOOLS / "tokenize_dataset.py"))
verify_shards = runpy.run_path(str(TOOLS / "verify_shards.py"))["main"]
SAMPLES = 10
Contents = Callable[[Path], dict[str, bytes]]


def write_images(folder: Path, change: Callable[[int, bytes], bytes] = lambda _, b: b) -> Path:
    """Images of 8 x 16; image k has k modulo 4 objects, all of them its right half but the first,
    which is the left pixel of its middle square."""
    with writing_shards(folder, "train", 8) as write:
        for number in range(SAMPLES):
            out = io.BytesIO()
            pixels = np.random.default_rng(number).integers(0, 256, (8, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(out, "PNG")
            boxes = [[4 / 16, 0, 1 / 16, 1], *[[0.5, 0, 0.5, 1]] * 3][: number % 4]
            objects = [
                {"category": 10 + k, "box": box, "flags": ["truncated"] * (k == 1)}
                for k, box in enumerate(boxes)
            ]
            facts = change(number, json.dumps({"objects": objects}).encode())
            write(f"{number:04d}", {"png": out.getvalue(), "json": facts})
    return folder


def run(model: Path, shards: Path, out: Path, *options: Any) -> None:
    arguments = [
        "--model",
        model,
        "--shards",
        shards,
        "--out",
        out,
        "--shard-samples",
        5,
        "--batch",
        4,
    ]
    TOOL["main"]([str(argument) for argument in (*arguments, *options)])


def test_crops_and_boxes_are_those_of_their_view(model: Path, tmp_path: Path) -> None:
    images, out = write_images(tmp_path / "images"), tmp_path / "out"
    run(model, images, out, "--coordinates", "--boxes", "--views", "flip")
    verify_shards([str(out)])
    reader = CodeReader(CodeDataset.open(str(out)), micro_batch=26, columns=["crop", "boxes"])
    (batch,) = reader.epoch_batches()
    found = batch.columns
    assert found["crop"].tolist() == [[0.25, 0, 0.5, 1, 0], [0.25, 0, 0.5, 1, 1]] * SAMPLES
    plain, mirrored = [[0, 0, 1 / 8, 1]], [[7 / 8, 0, 1 / 8, 1]]
    expected = [
        (first + [right] * 3)[: image % 4]
        for image in range(SAMPLES)
        for first, right in ((plain, [0.5, 0, 0.5, 1]), (mirrored, [0, 0, 0.5, 1]))
    ]
    ends = found["box_ends"][:-1]
    assert [part.tolist() for part in found["boxes"].tensor_split(ends)] == expected
    classes = [list(range(10, 10 + len(boxes))) for boxes in expected]
    assert [part.tolist() for part in found["box_class"].tensor_split(ends)] == classes
    assert torch.equal(found["box_flags"], 4 * (found["box_class"] == 11))


def test_workers_batches_and_threads_change_no_byte(
    model: Path, tmp_path: Path, contents: Contents
) -> None:
    images = write_images(tmp_path / "images")
    options = ("--coordinates", "--boxes", "--views", "random", "--crops", "2", "--size", "8")
    for name, batch, threads in (("one", 1, 1), ("all", 12, 2)):
        run(model, images, tmp_path / name, *options, "--batch", batch, "--threads", threads)
    arguments = ["--model", model, "--shards", images, "--out", tmp_path / "two", *options]
    args = TOOL["parse"]([str(each) for each in (*arguments, "--shard-samples", "5")])
    for number in (1, 0):
        tokenize(TOOL["make_job"](args), Worker(number, 2, 0), batch=4, threads=1, stale_s=1.0)
    one = contents(tmp_path / "one")
    assert len(one) == 3
    assert all(contents(tmp_path / name) == one for name in ("all", "two"))


def test_a_damaged_json_is_a_broken_sample(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = {3: b"{", 5: b"[" * 10**5, 6: b"{}", 9: b'{"objects": 0}'}
    images = write_images(tmp_path / "images", lambda number, data: damaged.get(number, data))
    run(model, images, tmp_path / "out", "--boxes")
    dataset = CodeDataset.open(str(tmp_path / "out"))
    assert dataset.num_samples == SAMPLES - len(damaged)
    assert "left out: 0005 in" in capsys.readouterr().out
    (batch,) = CodeReader(dataset, micro_batch=16, columns=["boxes"]).epoch_batches()
    good = [number for number in range(SAMPLES) if number not in damaged]
    ends = np.cumsum([number % 4 for number in good])
    assert batch.columns["box_ends"].tolist() == ends.tolist()


def test_images_without_objects_and_shards_without_the_columns_are_refused(
    model: Path, images: Callable[[int], Path], tmp_path: Path, contents: Contents
) -> None:
    out, plain = tmp_path / "out", images(1)
    with pytest.raises(UserError, match="--boxes needs the objects .* 0 of 8 samples"):
        run(model, plain, out, "--boxes")
    without = write_images(tmp_path / "without", lambda *_: b"{}")
    with pytest.raises(UserError, match="no list 'objects' .*--layout coco"):
        run(model, without, out, "--boxes")
    assert not out.exists()
    run(model, plain, out)
    before = contents(out)
    with pytest.raises(UserError, match="preprocessing .*'coordinates': True"):
        run(model, plain, out, "--coordinates")
    assert contents(out) == before
