import io
import json
import os
import re
import resource
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow
import pytest
import webdataset
from PIL import Image
from pyarrow import parquet

from taming_dist.data.images import COLUMNS, Preprocess
from taming_dist.data.reader import Batch, Reader, Reading
from taming_dist.errors import UserError
from taming_dist.formats.manifest import Manifest, resolve
from taming_dist.formats.shards import read_members
from tests.data import damage

TOOL = Path(__file__).parents[2] / "tools" / "make_shards.py"
tool = runpy.run_path(str(TOOL))
make_shards = tool["main"]


def picture(path: Path, value: int = 0, size: tuple[int, int] = (12, 8)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, 10, 20)).save(path)
    return path


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for name, value in (("cat", 40), ("ant", 80)):
        for number in range(6):
            picture(tmp_path / "images" / name / f"{number}.v1.png", value + number)
    return tmp_path / "images"


def make(images: Path, out: Path, *options: str) -> Manifest:
    make_shards(["--images", str(images), "--out", str(out), *options])
    return Manifest.load(out)


def read(out: Path, size: int = 8) -> list[Batch]:
    dataset = resolve(str(out))
    columns = [name for name, c in COLUMNS.items() if set(c.files) & set(dataset.columns)]
    return list(Reader(dataset, Reading(Preprocess(size), 4, columns=columns)).epoch_batches())


def test_class_folders_become_sorted_class_ids(images: Path, tmp_path: Path) -> None:
    manifest = make(images, tmp_path / "out", "--labels", "folders", "--shard-samples", "5")
    assert manifest.classes == ("ant", "cat")
    assert [shard.samples for shard in manifest.shards] == [5, 5, 2]
    for batch in read(tmp_path / "out"):
        assert batch.classes is not None
        images = batch.columns["image"]
        for key, cls, image in zip(batch.keys, batch.classes.tolist(), images, strict=True):
            assert key.partition("/")[0] == manifest.classes[cls]
            assert int(image[0, 0, 0]) // 40 == 2 - cls


def test_class_folders_are_mixed_in_every_shard(images: Path, tmp_path: Path) -> None:
    make(images, tmp_path / "out", "--labels", "folders", "--shard-samples", "6")
    first = [key.partition("/")[0] for batch in read(tmp_path / "out") for key in batch.keys][:6]
    assert len(set(first)) == 2


def test_files_go_in_as_they_are(images: Path, tmp_path: Path) -> None:
    make(images, tmp_path / "out")
    shard = (tmp_path / "out" / "train-000000.tar").read_bytes()
    assert all(path.read_bytes() in shard for path in images.rglob("*.png"))


def test_two_runs_make_the_same_bytes(images: Path, tmp_path: Path) -> None:
    for name in ("one", "other"):
        make(images, tmp_path / name)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "other" / path.name).read_bytes()


def test_a_second_run_has_nothing_to_do(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    make(images, out)
    before = {path: os.stat(path).st_mtime_ns for path in out.iterdir()}
    make(images, out)
    assert "nothing to do" in capsys.readouterr().out
    assert before == {path: os.stat(path).st_mtime_ns for path in out.iterdir()}
    picture(images / "cat" / "new.png")
    with pytest.raises(UserError, match="holds shards with other images"):
        make(images, out)


def test_what_cannot_be_read_is_listed_and_counted(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (images / "cat" / "fake.jpg").write_text("no image")
    whole = picture(images / "cat" / "cut.jpg", size=(64, 64)).read_bytes()
    (images / "cat" / "cut.jpg").write_bytes(whole[:-300])
    (images / "cat" / "notes.txt").write_text("notes")
    manifest = make(images, tmp_path / "out", "--labels", "folders")
    out = capsys.readouterr().out
    listed = (tmp_path / "out" / "left_out.jsonl").read_text()
    for name in ("cat/fake.jpg", "cat/cut.jpg", "cat/notes.txt"):
        assert f"left out: {name}: " in out
        assert name in listed
    assert manifest.details["left_out"] == {"other file": 1, "truncated": 1, "unreadable": 1}
    assert "12 images" in out
    assert "3 files left out" in out


def test_damaged_pictures_are_left_out_or_what_is_left_is_stored_and_counted(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = damage.encode("JPEG")
    (images / "cat" / "half.jpg").write_bytes(damage.cut(whole))
    (images / "cat" / "filled.jpg").write_bytes(whole[:-2] + bytes(3) + damage.END)
    manifest = make(images, tmp_path / "skipped")
    assert manifest.details["left_out"] == {"damaged": 1}
    assert "left out: cat/half.jpg: the image is damaged: premature end" in capsys.readouterr().out
    manifest = make(images, tmp_path / "used", "--damaged", "use")
    assert manifest.details["left_out"] == {}
    assert manifest.details["notes"] == {"damaged": 1}
    assert "of the images: 1 damaged" in capsys.readouterr().out
    assert sum(len(batch) for batch in read(tmp_path / "used")) == 14


def test_larger_images_are_scaled_down_with_their_label_maps(tmp_path: Path) -> None:
    picture(tmp_path / "images" / "a.png", size=(48, 32))
    picture(tmp_path / "images" / "b.png", size=(12, 8))
    for name, shape in (("a", (32, 48)), ("b", (8, 12))):
        (tmp_path / "maps").mkdir(exist_ok=True)
        labels = np.full(shape, 7, dtype=np.uint8)
        Image.fromarray(labels).save(tmp_path / "maps" / f"{name}.png")
    maps = ["--segmentations", str(tmp_path / "maps")]
    manifest = make(tmp_path / "images", tmp_path / "out", "--short-side", "16", *maps)
    columns = manifest.shards[0].columns
    assert columns == {"jpg": 1, "png": 1, "seg.png": 2}
    (batch,) = read(tmp_path / "out")
    assert (batch.columns["seg.png"] == 7).all()


def test_an_image_without_its_label_map_is_left_out_and_listed(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in sorted(images.rglob("*.png"))[1:]:
        target = tmp_path / "maps" / path.relative_to(images)
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (12, 8)).save(target)
    make(images, tmp_path / "out", "--segmentations", str(tmp_path / "maps"))
    assert "left out: ant/0.v1.png: " in capsys.readouterr().out


def test_captions_beside_the_images_are_stored_as_they_are(images: Path, tmp_path: Path) -> None:
    for number, path in enumerate(sorted(images.rglob("*.png"))):
        if number:
            caption = b" \n" if number == 1 else f"an image, {path.name}\nanother".encode()
            path.with_suffix(".txt").write_bytes(caption)
    manifest = make(images, tmp_path / "out", "--captions", str(images))
    assert manifest.details["left_out"] == {"pair": 2, "other file": 11}
    files = read_members(tmp_path / "out" / "train-000000.tar")
    found = [bytes(data) for name, data in files.items() if name.endswith(".txt")]
    assert len(found) == 10
    assert all(text.startswith(b"an image, ") for text in found)


def test_names_that_a_tar_cannot_hold_get_other_keys(tmp_path: Path) -> None:
    for name in (
        "a.b/\u00fc x.png",
        "a_b/__x.png",
        f"{'d' * 60}/{'e' * 60}.png",
        "same.png",
        "same.jpg",
    ):
        picture(tmp_path / "images" / name)
    make(tmp_path / "images", tmp_path / "out")
    keys = [key for batch in read(tmp_path / "out") for key in batch.keys]
    assert len(set(keys)) == 5


def test_mistakes_are_one_line_and_leave_nothing(images: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"x")
    picture(images / "loose.png")
    out = tmp_path / "out"
    for folder, options, message in (
        (tmp_path / "none", [], "there is no such folder"),
        (tmp_path / "empty", [], "no jpg, png or webp file"),
        (tmp_path / "broken", [], "none of 1 images can be used; the first: a.png: not a JPEG"),
        (images, ["--labels", "folders"], r"loose\.png is not in a class folder"),
        (images, ["--shard-samples", "0"], "--shard-samples: '0' is invalid"),
        (images, ["--prefix", "../x"], "--prefix"),
        (
            images,
            ["--quality", "101"],
            "--quality: '101' is invalid: use a whole number from 1 to 100",
        ),
        (images, ["--val-fraction", "1.5"], "--val-fraction: '1.5' is invalid"),
        (images, ["--val-fraction", "1e-9"], "leaves no image"),
        (images, ["--val-fraction", "0.1", "--prefix", "x"], "omit --prefix"),
        (images, ["--low-resolution", "1"], "--low-resolution is 1"),
        (images, ["--depth", str(tmp_path / "none")], "--depth .*there is no such folder"),
        (images, ["--depth", str(tmp_path / "empty")], r"the first: .*\.png: .* is missing"),
        (images, ["--min-side", "9"], "the first: .* 12 x 8 pixels: a side below 9"),
        (
            images,
            ["--shard-samples", "x"],
            "--shard-samples: 'x' is invalid: use a whole number from 1; see --help",
        ),
        (images, ["--root", str(tmp_path)], "--root requires --list"),
    ):
        with pytest.raises(UserError, match=message):
            make(folder, out, *options)
        assert not out.exists() or not list(out.iterdir())


def test_workers_make_the_same_bytes(images: Path, tmp_path: Path) -> None:
    (images / "cat" / "broken.png").write_bytes(b"x")
    options = ["--shard-samples", "3", "--short-side", "8", "--val-fraction", "0.3"]
    for workers in ("1", "2"):
        make_shards(
            ["--images", str(images), "--out", str(tmp_path / workers), "--workers", workers]
            + options
        )
    files = [path for path in (tmp_path / "1").rglob("*") if path.is_file()]
    assert len(files) > 8
    for path in files:
        other = tmp_path / "2" / path.relative_to(tmp_path / "1")
        assert path.read_bytes() == other.read_bytes()


def test_a_run_that_was_killed_goes_on_and_makes_the_same_bytes(tmp_path: Path) -> None:
    images = tmp_path / "images"
    noise = np.random.default_rng(0).integers(0, 256, (400, 400, 3), dtype=np.uint8)
    picture(images / "0.png").write_bytes(b"broken")
    for number in range(1, 120):
        Image.fromarray(np.roll(noise, number)).save(images / f"{number}.jpg")
    options = ["--images", str(images), "--short-side", "200", "--shard-samples", "10"]
    make_shards([*options, "--out", str(tmp_path / "whole")])
    out = tmp_path / "out"
    command = [sys.executable, str(TOOL), *options, "--out", str(out), "--workers", "2"]
    killed = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while len(list((out / "unfinished").glob("*.tar.json"))) < 3:
        assert killed.poll() is None, "it was done before it could be killed"
        time.sleep(0.005)
    killed.kill()
    killed.wait()
    kept = {path: path.stat().st_mtime_ns for path in (out / "unfinished").glob("*.tar.json")}
    assert not (out / "manifest.json").exists()
    assert (out / "unfinished.lock").exists()  # and is in nobody's way
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    assert re.search(r"\d+ shards? from an interrupted run checked and kept", done.stdout)
    assert kept
    assert {path.name for path in out.iterdir()} == {
        path.name for path in (tmp_path / "whole").iterdir()
    }
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (out / path.name).read_bytes()


@contextmanager
def running(
    images: Path, out: Path, *options: str, ctrl_c: signal.Handlers = signal.SIG_DFL
) -> Iterator["subprocess.Popen[str]"]:
    """A run of its own with two workers, at work on its shards; killed at the end."""
    command = [sys.executable, str(TOOL), "--images", str(images), "--out", str(out), *options]
    process = subprocess.Popen(
        [*command, "--workers", "2", "--shard-samples", "5"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=partial(signal.signal, signal.SIGINT, ctrl_c),
    )
    try:
        while not list((out / "unfinished").glob("*.tar.json")):
            assert process.poll() is None, "it was done before anything could happen to it"
            time.sleep(0.005)
        yield process
    finally:
        process.kill()
        process.wait()
        for pipe in (process.stdout, process.stderr):
            assert pipe is not None
            pipe.close()


@pytest.fixture
def photographs(tmp_path: Path) -> Path:
    """Images that take a second to scale."""
    noise = np.random.default_rng(0).integers(0, 256, (700, 700, 3), dtype=np.uint8)
    picture(tmp_path / "photographs" / "0.jpg")
    for number in range(1, 40):
        Image.fromarray(np.roll(noise, number)).save(tmp_path / "photographs" / f"{number}.jpg")
    return tmp_path / "photographs"


def test_two_runs_do_not_work_in_one_folder(photographs: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with running(photographs, out, "--short-side", "500") as first:
        first.send_signal(signal.SIGSTOP)  # so that it cannot be done too early
        command = [sys.executable, str(TOOL), "--images", str(photographs), "--out", str(out)]
        second = subprocess.run(command, capture_output=True, text=True, check=False)
        assert second.returncode == 2
        assert second.stderr == (
            f"error: another run makes shards in {out} (process {first.pid} of "
            f"{socket.gethostname()}): wait until it ends, or choose another folder\n"
        )
        first.send_signal(signal.SIGCONT)
        said, error = first.communicate()
    assert (first.returncode, error) == (0, "")
    assert f"40 images in {out}" in said
    assert sum(shard.samples for shard in Manifest.load(out).shards) == 40
    assert not (out / "unfinished.lock").exists()


def test_a_worker_that_outlives_its_run_keeps_the_folder_locked(
    photographs: Path, tmp_path: Path
) -> None:
    out, options = tmp_path / "out", ("--short-side", "500", "--shard-samples", "5")
    with running(photographs, out, *options) as killed:
        (workers,) = (w for child in children(killed.pid) if len(w := children(child)) == 2)
        for worker in workers:
            os.kill(worker, signal.SIGSTOP)  # as if it hung in the middle of a file
        while not all(map(is_stopped, workers)):
            time.sleep(0.005)
    try:
        with pytest.raises(UserError, match="another run makes shards"):
            make(photographs, out, *options)
    finally:
        for worker in workers:
            os.kill(worker, signal.SIGCONT)
    assert sum(shard.samples for shard in make(photographs, out, *options).shards) == 40


def test_ctrl_c_is_one_line_and_the_run_goes_on_later(photographs: Path, tmp_path: Path) -> None:
    out, options = tmp_path / "out", ("--short-side", "500", "--shard-samples", "5")
    with running(photographs, out, *options) as process:
        press_ctrl_c(process.pid)
        said, error = process.communicate()
    assert (process.returncode, error) == (130, "")
    assert said.endswith("\ninterrupted: the same command resumes from here\n")
    assert not (out / "unfinished.lock").exists()
    assert sum(shard.samples for shard in make(photographs, out, *options).shards) == 40


def test_ctrl_c_does_not_reach_a_run_in_the_background_of_a_script(
    photographs: Path, tmp_path: Path
) -> None:
    options = ("--short-side", "500", "--shard-samples", "5")
    with running(photographs, tmp_path / "out", *options, ctrl_c=signal.SIG_IGN) as process:
        press_ctrl_c(process.pid)
        said, error = process.communicate()
    assert (process.returncode, error) == (0, "")
    assert f"40 images in {tmp_path / 'out'}" in said


def press_ctrl_c(process: int) -> None:
    """Send what a terminal does to a process and all that it has started."""
    group = [child for one in children(process) for child in (one, *children(one))]
    for pid in (process, *group):
        os.kill(pid, signal.SIGINT)


def is_stopped(process: int) -> bool:
    """Whether all threads of a process are stopped: none ends it when its parent dies."""
    states = [path.read_text() for path in Path(f"/proc/{process}/task").glob("*/stat")]
    return all(state.rpartition(")")[2].split()[0] == "T" for state in states)


def children(process: int) -> list[int]:
    """The processes that a process has started."""
    return [
        int(pid) for pid in Path(f"/proc/{process}/task/{process}/children").read_text().split()
    ]


def test_an_interrupted_run_of_another_command_is_not_mixed_in(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setitem(make_shards.__globals__, "finish", interrupt)
        with pytest.raises(SystemExit):
            make(images, out)
    with pytest.raises(UserError, match="an interrupted run of another command"):
        make(images, out, "--short-side", "8")
    make(images, out)


def test_a_layout_s_boxes_and_maps_come_through(tmp_path: Path) -> None:
    root = tmp_path / "coco"
    picture(root / "val2017" / "7.jpg", size=(40, 20))
    labels = Image.new("L", (40, 20), 255)
    labels.putpixel((0, 0), 17)
    (root / "stuffthingmaps" / "val2017").mkdir(parents=True)
    labels.save(root / "stuffthingmaps" / "val2017" / "7.png")
    (root / "annotations").mkdir()
    annotations = {
        "images": [{"id": 7, "file_name": "7.jpg", "width": 40, "height": 20}],
        "categories": [{"id": 3, "name": "car"}],
        "annotations": [{"image_id": 7, "category_id": 3, "bbox": [4, 5, 20, 10], "iscrowd": 0}],
    }
    (root / "annotations" / "instances_val2017.json").write_text(json.dumps(annotations))
    out = tmp_path / "out"
    make_shards(["--layout", "coco", str(root), "val", "--out", str(out)])
    assert Manifest.load(out).details["categories"] == ["car"]
    members = read_members(out / "train-000000.tar")
    assert set(members) == {"7.jpg", "7.seg.png", "7.json"}
    stored = np.array(Image.open(io.BytesIO(members["7.seg.png"])))
    assert np.array_equal(np.unique(stored), [0, 18])
    objects = json.loads(bytes(members["7.json"]))["objects"]
    assert objects == [{"category": 0, "box": [0.1, 0.25, 0.5, 0.5]}]


def test_a_table_becomes_shards_and_its_copy_goes_away(tmp_path: Path) -> None:
    rows = [picture(tmp_path / f"{number}.png", number).read_bytes() for number in range(5)]
    columns = {"image": [{"bytes": data, "path": None} for data in rows], "label": [4, 3, 2, 1, 0]}
    parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    out = tmp_path / "out"
    make_shards(["--parquet", str(tmp_path / "a.parquet"), "--out", str(out)])
    members = read_members(out / "train-000000.tar")
    for number, data in enumerate(rows):
        assert members[f"a/{number:08d}.png"] == data
        assert members[f"a/{number:08d}.cls"] == str(4 - number).encode()
    assert {path.name for path in out.iterdir()} == {
        "manifest.json", "train-000000.tar", "train-000000.tar.idx",
    }  # fmt: skip


def test_images_without_a_class_among_others_are_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [picture(tmp_path / f"{number}.png", number).read_bytes() for number in range(3)]
    for name, labels in (("some", [1, None, 0]), ("all", [1, 2, 0]), ("none", [None] * 3)):
        parquet.write_table(pyarrow.table({"image": rows, "label": labels}), tmp_path / name)
        make_shards(["--parquet", str(tmp_path / name), "--out", str(tmp_path / f"{name}-shards")])
        said = (
            "without a class: 1 image, so codes made from these shards have no classes"
            in capsys.readouterr().out
        )
        assert said == (name == "some")


def test_a_full_disk_is_one_line_and_the_run_goes_on_later(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = subprocess.run(
        [sys.executable, str(TOOL), "--images", str(images), "--out", str(out)],
        capture_output=True,
        text=True,
        check=False,
        # The list of images fits, the shard does not.
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192)),
    )
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: --out {out} cannot be written (File too large)")
    assert done.stderr.count("\n") == 1
    assert [path.name for path in out.iterdir()] == ["unfinished"]
    assert sum(shard.samples for shard in make(images, out).shards) == 12


def test_a_run_that_ends_while_it_tidies_up_is_complete(
    images: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", interrupt)
        with pytest.raises(SystemExit):
            make(images, out)
    assert (out / "unfinished").exists()
    make(images, out)
    assert "nothing to do" in capsys.readouterr().out
    assert not (out / "unfinished").exists()


def test_an_image_that_is_listed_twice_is_refused(images: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("images/cat/1.v1.png\nimages/cat/../cat/1.v1.png\n")
    with pytest.raises(UserError, match=r"images/cat/1\.v1\.png is listed twice"):
        make_shards(["--list", str(tmp_path / "a.txt"), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()


def test_the_split_by_key_is_exact_and_stable(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    make_shards(["--images", str(images), "--out", str(out), "--val-fraction", "0.4"])
    train, val = (
        {key for batch in read(out / name) for key in batch.keys} for name in ("train", "val")
    )
    assert len(train) + len(val) == 12
    assert not train & val
    assert (out / "val" / "val-000000.tar").exists()
    make_shards(["--images", str(images), "--out", str(out), "--val-fraction", "0.4"])


def test_shards_by_bytes(images: Path, tmp_path: Path) -> None:
    manifest = make(images, tmp_path / "out", "--shard-bytes", "4K")
    assert len(manifest.shards) > 2
    # a tar ends with 1024 bytes of its own
    assert all(shard.bytes <= 4096 + 1024 for shard in manifest.shards)


def test_computed_conditions_are_those_of_the_stored_image(tmp_path: Path) -> None:
    picture(tmp_path / "images" / "a.png", size=(96, 64))
    manifest = make(
        tmp_path / "images", tmp_path / "out", "--short-side", "32", "--edges", "canny",
        "--low-resolution", "4",
    )  # fmt: skip
    assert manifest.shards[0].columns == {"edges.png": 1, "jpg": 1, "lr.png": 1}
    members = read_members(tmp_path / "out" / "train-000000.tar")
    sizes = {name: Image.open(io.BytesIO(data)).size for name, data in members.items()}
    assert sizes == {"a.jpg": (48, 32), "a.edges.png": (48, 32), "a.lr.png": (12, 8)}


def test_pairs_of_a_rotated_photo_stay_on_it(tmp_path: Path) -> None:
    labels = np.arange(12 * 8, dtype=np.uint8).reshape(8, 12)
    exif = Image.Exif()
    exif[0x0112] = 6
    for name, map in (("raw", labels), ("upright", np.rot90(labels, -1))):
        for folder in ("images", "maps"):
            (tmp_path / folder).mkdir(exist_ok=True)
        colours = np.repeat(labels[:, :, None], 3, axis=2)
        Image.fromarray(colours).save(tmp_path / "images" / f"{name}.png", exif=exif.tobytes())
        Image.fromarray(map).save(tmp_path / "maps" / f"{name}.png")
    picture(tmp_path / "images" / "other.png", size=(12, 8))
    Image.new("L", (9, 9)).save(tmp_path / "maps" / "other.png")
    out = tmp_path / "out"
    manifest = make(tmp_path / "images", out, "--segmentations", str(tmp_path / "maps"))
    assert manifest.details["notes"] == {"turned upright": 2}
    assert manifest.details["left_out"] == {"pair": 1}
    members = read_members(out / "train-000000.tar")
    for name in ("raw", "upright"):
        image = np.array(Image.open(io.BytesIO(members[f"{name}.png"])))[:, :, 0]
        stored = np.array(Image.open(io.BytesIO(members[f"{name}.seg.png"])))
        assert np.array_equal(image, np.rot90(labels, -1))
        assert np.array_equal(stored, image)


def test_shards_are_read_by_stock_webdataset(images: Path, tmp_path: Path) -> None:
    make(images, tmp_path / "out", "--labels", "folders", "--shard-samples", "100")
    shard = str(tmp_path / "out" / "train-000000.tar")
    samples = list(webdataset.WebDataset(shard, shardshuffle=False).decode("rgb8"))
    assert len(samples) == 12
    for sample in samples:
        assert sample["png"].shape == (8, 12, 3)
        assert sample["cls"] == int(sample["__key__"].startswith("cat"))


def test_the_tool_ends_with_code_2_and_one_line_on_a_mistake(tmp_path: Path) -> None:
    command = [sys.executable, str(TOOL), "--images", str(tmp_path / "none"), "--out", "x"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path}/none: there is no such folder")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("labels", [(), ("--labels", "folders")])
def test_hidden_and_system_folders_are_listed_once_and_not_used(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], labels: tuple[str, ...]
) -> None:
    for name in (".ipynb_checkpoints", "__MACOSX", "cat/@eaDir", "ant/@eaDir"):
        picture(images / name / "0.png")
        picture(images / name / "1.png")
    manifest = make(images, tmp_path / "out", *labels)
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if "@eaDir" in line]
    assert line.startswith("left out, hidden or system files: @eaDir (2), ")
    assert "12 images" in out
    assert manifest.details["left_out"] == {"hidden": 4}
    assert manifest.classes == (("ant", "cat") if labels else None)
    listed = (tmp_path / "out" / "left_out.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["name"] for line in listed) == [
        ".ipynb_checkpoints/", "__MACOSX/", "ant/@eaDir/", "cat/@eaDir/",
    ]  # fmt: skip


def test_a_folder_of_hidden_images_only_is_one_line(tmp_path: Path) -> None:
    picture(tmp_path / "images" / ".thumbs" / "0.png")
    with pytest.raises(UserError, match=r"\.thumbs/: a hidden or system folder: rename it"):
        make(tmp_path / "images", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("label", [2**33, -1])
def test_a_class_out_of_range_is_refused_and_nothing_stays(
    images: Path, tmp_path: Path, label: int
) -> None:
    (tmp_path / "a.csv").write_text(f"path,label\ncat/0.v1.png,0\ncat/1.v1.png,{label}\n")
    out = tmp_path / "out"
    arguments = ["--list", str(tmp_path / "a.csv"), "--root", str(images), "--out", str(out)]
    with pytest.raises(UserError, match=rf"cat/1\.v1\.png: the class {label} is outside the range"):
        make_shards(arguments)
    assert not out.exists()
    make_shards([*arguments, "--labels", "none"])
    assert "cls" not in Manifest.load(out).shards[0].columns


def test_names_of_any_bytes_are_utf8_in_all_that_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    for name in (b"m\xfcde/0.png", b"wach/0.png"):
        picture(folder / os.fsdecode(name))
    (folder / os.fsdecode(b"m\xfcde/\xff.txt")).touch()
    manifest = make(folder, folder / "out", "--labels", "folders")
    assert manifest.classes == ("m\\xfcde", "wach")
    assert "m\\xfcde/\\xff.txt" in capsys.readouterr().out
    for name in ("manifest.json", "left_out.jsonl"):
        lines = (folder / "out" / name).read_text(encoding="utf-8").splitlines()
        assert not any("\\udc" in line for line in lines)
