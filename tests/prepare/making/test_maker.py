import errno
import fcntl
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from taming_dist.errors import UserError
from taming_dist.formats.shards import split_name
from taming_dist.prepare.collections.entry import is_image
from taming_dist.prepare.collections.folders import ImageFolder
from taming_dist.prepare.making import maker as module
from taming_dist.prepare.making.catalogue import (
    Catalogue,
    digest_of,
    key_of,
    list_images,
)
from taming_dist.prepare.making.maker import (
    Job,
    ShardMaker,
    Split,
    cut,
    locking,
    run,
    split_by_key,
)
from taming_dist.prepare.making.samples import Recipe


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(20):
        Image.new("RGB", (10, 10), (number, 0, 0)).save(folder / f"{number}.png")
    return folder


@given(
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=60),
    max_samples=st.none() | st.integers(1, 10),
    max_bytes=st.none() | st.integers(1, 120),
)
def test_shards_hold_every_image_once_and_no_more_than_they_may(
    sizes: list[int], max_samples: int | None, max_bytes: int | None
) -> None:
    bounds = cut(np.array(sizes), max_samples, max_bytes)
    assert (bounds[0], bounds[-1]) == (0, len(sizes))
    for start, stop in zip(bounds, bounds[1:], strict=False):
        assert start < stop
        assert max_samples is None or stop - start <= max_samples
        assert max_bytes is None or stop - start == 1 or sum(sizes[start:stop]) <= max_bytes
        if max_bytes is not None and stop < len(sizes) and stop - start != max_samples:
            assert sum(sizes[start : stop + 1]) > max_bytes


def test_the_order_and_the_split_depend_on_the_names_alone(images: Path, tmp_path: Path) -> None:
    catalogue = list_images(tmp_path / "a", ImageFolder(images), "")
    train, val = split_by_key(catalogue, 0.3)
    names = [catalogue.record(int(i)).name for i in train]
    held_out = {catalogue.record(int(i)).name for i in val}
    assert len(names) + len(held_out) == 20
    assert 0 < len(held_out) < 20
    # More images change neither the order of the others nor their split.
    for number in range(20, 30):
        Image.new("RGB", (10, 10)).save(images / f"{number}.png")
    more = list_images(tmp_path / "b", ImageFolder(images), "")
    train, val = split_by_key(more, 0.3)
    old = [name for i in train if int(Path(name := more.record(int(i)).name).stem) < 20]
    assert old == names
    assert held_out <= {more.record(int(i)).name for i in val}


def test_the_digest_sees_files_settings_and_times(images: Path, tmp_path: Path) -> None:
    collection = ImageFolder(images)
    digest = list_images(tmp_path / "a", collection, "x").digest
    assert digest_of(collection, "x") == digest
    assert digest_of(collection, "y") != digest
    os.utime(images / "3.png", (1, 1))
    assert digest_of(collection, "x") != digest


@settings(max_examples=50)
@given(st.text(min_size=1, max_size=150))
def test_any_name_gives_a_key_that_a_tar_can_hold(name: str) -> None:
    for is_ambiguous in (False, True):
        key = key_of(f"{name}.jpg", is_ambiguous)
        assert len(key) <= 80
        assert key.isascii()
        if is_image(f"{name}.jpg"):
            assert split_name(f"{key}.jpg") == (key, "jpg")


def test_images_that_share_a_key_get_their_own(images: Path, tmp_path: Path) -> None:
    Image.new("RGB", (10, 10)).save(images / "3.jpg")
    catalogue = list_images(tmp_path / "work", ImageFolder(images), "")
    assert catalogue.ambiguous.sum() == 2
    keys = {
        key_of(catalogue.record(i).name, bool(catalogue.ambiguous[i]))
        for i in range(len(catalogue))
    }
    assert len(keys) == 21


def prepared(images: Path, folder: Path) -> tuple[ShardMaker, list[Job]]:
    work, out = folder / "work", folder / "out"
    out.mkdir(parents=True, exist_ok=True)
    catalogue = Catalogue(work) if work.exists() else list_images(work, ImageFolder(images), "")
    order, _ = split_by_key(catalogue, 0.0)
    jobs = [Job("a", number, 5 * number, 5 * number + 5) for number in range(4)]
    return ShardMaker(catalogue, work, [Split(out, "a", order)], Recipe()), jobs


def test_a_finished_shard_is_kept_if_it_is_whole_and_made_again_if_not(
    images: Path, tmp_path: Path
) -> None:
    maker, jobs = prepared(images, tmp_path)
    first = list(run(maker, jobs, 1))
    tars = sorted((tmp_path / "out").glob("*.tar"))
    before = [tar.read_bytes() for tar in tars]
    tars[1].write_bytes(before[1][:-512] + b"x" * 512)  # same size, other bytes
    tars[2].with_name(tars[2].name + ".idx").write_bytes(bytes(48))
    tars[3].unlink()
    maker, jobs = prepared(images, tmp_path)
    second = list(run(maker, jobs, 1))
    assert [report.was_kept for report in second] == [True, False, False, False]
    assert [tar.read_bytes() for tar in tars] == before
    assert [report.shard for report in second] == [report.shard for report in first]


def test_an_image_that_changes_meanwhile_is_left_out(images: Path, tmp_path: Path) -> None:
    maker, jobs = prepared(images, tmp_path)
    Image.new("RGB", (40, 40), (1, 2, 3)).save(images / "3.png")
    (images / "4.png").unlink()
    left_out = [entry for report in run(maker, jobs, 1) for entry in report.left_out]
    assert {(entry.name, entry.kind) for entry in left_out} == {
        ("3.png", "changed"),
        ("4.png", "changed"),
    }


def test_a_file_that_cannot_be_read_stops_the_run(images: Path, tmp_path: Path) -> None:
    maker, jobs = prepared(images, tmp_path)
    (images / "3.png").unlink()
    (images / "3.png").mkdir()
    with pytest.raises(UserError, match=r"3\.png cannot be read .*fix or remove it"):
        list(run(maker, jobs, 1))
    (images / "3.png").rmdir()
    left_out = [entry for report in run(maker, jobs, 1) for entry in report.left_out]
    assert [(entry.name, entry.kind) for entry in left_out] == [("3.png", "changed")]


def test_what_is_no_file_is_left_out_of_the_list(images: Path, tmp_path: Path) -> None:
    (images / "link.png").symlink_to("nothing")
    (images / "loop.png").symlink_to("loop.png")
    os.mkfifo(images / "pipe.png")
    catalogue = list_images(tmp_path / "work", ImageFolder(images), "")
    assert len(catalogue) == 20
    found = {(entry.name, entry.kind) for entry in catalogue.left_out()}
    assert found == {(f"{name}.png", "missing") for name in ("link", "loop", "pipe")}


def test_a_worker_that_dies_is_said_so() -> None:
    with pytest.raises(UserError, match="a worker process was killed"):
        list(run(os._exit, [1, 1], 2))  # type: ignore[arg-type]


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOCK_PATIENCE_S", 0.1)


def test_a_folder_is_locked_once_and_leaves_no_trace(tmp_path: Path, impatient: None) -> None:
    path = tmp_path / "a" / "b" / "lock"
    for _ in range(2):
        with locking(path):
            with pytest.raises(UserError, match=f"another run .*process {os.getpid()} of "):
                locking(path).__enter__()
            with locking(tmp_path / "other" / "lock"):
                assert path.exists()
        assert not path.parent.exists()
        assert not (tmp_path / "other").exists()


def test_what_was_made_in_a_locked_folder_stays(tmp_path: Path) -> None:
    with locking(tmp_path / "lock"):
        (tmp_path / "shard").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["shard"]


def test_a_lock_that_its_holder_removes_meanwhile_locks_nobody_out(
    tmp_path: Path, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, real = tmp_path / "lock", fcntl.flock

    def late(descriptor: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", real)
        path.unlink()  # between the opening of the file and its locking
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with locking(path), pytest.raises(UserError, match="another run"):
        locking(path).__enter__()


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS])
def test_a_file_system_without_locks_is_said_so(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: int) -> None:
        raise OSError(code, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with locking(tmp_path / "a" / "lock") as lock:
        assert lock is None
        assert "its file system has no locks" in capsys.readouterr().out
    assert not (tmp_path / "a").exists()
