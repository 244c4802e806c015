import os
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from taming_dist.data.images import MAP_COLUMNS, Preprocess
from taming_dist.data.manifest import Manifest, resolve
from taming_dist.data.reader import Batch, Reader
from taming_dist.errors import UserError

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
    columns = [name for name in MAP_COLUMNS if name in dataset.columns]
    return list(Reader(dataset, Preprocess(size), micro_batch=4, columns=columns).epoch_batches())


def test_class_folders_become_sorted_class_ids(images: Path, tmp_path: Path) -> None:
    manifest = make(images, tmp_path / "out", "--labels", "folders", "--shard-samples", "5")
    assert manifest.classes == ("ant", "cat")
    assert [shard.samples for shard in manifest.shards] == [5, 5, 2]
    for batch in read(tmp_path / "out"):
        assert batch.classes is not None
        for key, cls, image in zip(batch.keys, batch.classes.tolist(), batch.images, strict=True):
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
    with pytest.raises(UserError, match="holds shards of other images"):
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
    for name in ("cat/fake.jpg", "cat/cut.jpg", "cat/notes.txt"):
        assert f"left out: {name}: " in out
        assert name in manifest.details["skipped"]
    assert "12 images" in out
    assert "3 files left out" in out


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
    assert batch.segmentations is not None
    assert (batch.segmentations == 7).all()


def test_an_image_without_its_label_map_is_left_out_and_listed(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in sorted(images.rglob("*.png"))[1:]:
        target = tmp_path / "maps" / path.relative_to(images)
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (12, 8)).save(target)
    make(images, tmp_path / "out", "--segmentations", str(tmp_path / "maps"))
    assert "left out: ant/0.v1.png: " in capsys.readouterr().out


def test_the_work_of_planning_grows_with_the_images_and_not_with_their_square(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    is_image = tool["is_image"]

    def counted(name: str) -> bool:
        calls.append(name)
        return bool(is_image(name))

    monkeypatch.setitem(make_shards.__globals__, "is_image", counted)
    for number in range(30):
        picture(tmp_path / "images" / "a" / f"{number}.png")
    make(tmp_path / "images", tmp_path / "out", "--labels", "folders")
    assert len(calls) <= 4 * 30


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
        (tmp_path / "broken", [], "none of 1 images can be read"),
        (images, ["--labels", "folders"], r"loose\.png lies in no class folder"),
        (images, ["--shard-samples", "0"], "--shard-samples is 0"),
        (images, ["--prefix", "../x"], "--prefix"),
    ):
        with pytest.raises(UserError, match=message):
            make(folder, out, *options)
        assert not out.exists() or not list(out.iterdir())


def test_the_tool_ends_with_code_2_and_one_line_on_a_mistake(tmp_path: Path) -> None:
    command = [sys.executable, str(TOOL), "--images", str(tmp_path / "none"), "--out", "x"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --images")
    assert done.stderr.count("\n") == 1
