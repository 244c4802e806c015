import os
from pathlib import Path

import pytest

from taming_dist.errors import UserError
from taming_dist.prepare.collections.entry import Entry, LeftOut
from taming_dist.prepare.collections.folders import ClassFolders, ImageFolder, Paired, walk_files


def touch(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    return root


def test_links_are_followed_but_not_in_circles(tmp_path: Path) -> None:
    touch(tmp_path, "a/x/1.jpg", "elsewhere/2.jpg")
    (tmp_path / "a" / "y").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "a" / "gone.jpg").symlink_to(tmp_path / "nothing")
    assert set(walk_files(tmp_path / "a")) == {"x/1.jpg", "y/2.jpg", "gone.jpg"}
    (tmp_path / "a" / "x" / "loop").symlink_to(tmp_path / "a")
    with pytest.raises(UserError, match="links to a folder above itself"):
        list(walk_files(tmp_path / "a"))


def test_files_that_are_no_images_are_named(tmp_path: Path) -> None:
    touch(tmp_path, "a.JPG", "b.jpeg", "c.webp", "d.npy", ".jpg", "e.txt", "f")
    found = list(ImageFolder(tmp_path))
    assert {entry.name for entry in found if isinstance(entry, Entry)} == {
        "a.JPG", "b.jpeg", "c.webp", "d.npy",
    }  # fmt: skip
    assert {entry.name for entry in found if isinstance(entry, LeftOut)} == {".jpg", "e.txt", "f"}


def test_empty_folders_are_no_classes(tmp_path: Path) -> None:
    touch(tmp_path, "b/1.jpg", "a/notes/n.txt")
    (tmp_path / "empty" / "deep").mkdir(parents=True)
    assert ClassFolders(tmp_path).classes == ("a", "b")


def test_pairs_have_the_image_s_name(tmp_path: Path) -> None:
    touch(tmp_path, "i/x/1.jpg", "i/2.jpg", "s/x/1.png", "s/2.png", "l/x/1.jpg", "l/2.png")
    folders = {"seg": tmp_path / "s", "lr": tmp_path / "l"}
    found = {entry.name: entry for entry in Paired(ImageFolder(tmp_path / "i"), folders)}
    assert isinstance(first := found["x/1.jpg"], Entry)
    assert first.pairs == {"seg": tmp_path / "s/x/1.png", "lr": tmp_path / "l/x/1.jpg"}
    assert isinstance(second := found["2.jpg"], Entry)
    assert second.pairs["lr"] == tmp_path / "l/2.png"
    (tmp_path / "s/2.png").unlink()
    assert LeftOut("2.jpg", "pair", f"{tmp_path}/s/2.png is missing") in list(
        Paired(ImageFolder(tmp_path / "i"), folders)
    )


SYSTEM = (".ipynb_checkpoints", "__MACOSX", "@eaDir", ".Trash-1000", "$RECYCLE.BIN")


@pytest.mark.parametrize("kind", [ImageFolder, ClassFolders])
def test_hidden_and_system_folders_are_left_out_and_listed(
    tmp_path: Path, kind: type[ImageFolder]
) -> None:
    touch(tmp_path, "cat/1.jpg", "cat/@eaDir/1.jpg", "cat/._1.jpg", "dog/2.jpg", "dust/.DS_Store")
    touch(tmp_path, *(f"{name}/deep/1.jpg" for name in SYSTEM))
    found = list(kind(tmp_path))
    assert {e.name for e in found if isinstance(e, Entry)} == {"cat/1.jpg", "dog/2.jpg"}
    assert {e.name for e in found if isinstance(e, LeftOut) and e.kind == "hidden"} == {
        *(f"{name}/" for name in SYSTEM), "cat/@eaDir/", "cat/._1.jpg",
    }  # fmt: skip
    if kind is ClassFolders:
        assert kind(tmp_path).classes == ("cat", "dog")


def test_a_folder_that_is_named_may_be_hidden_itself(tmp_path: Path) -> None:
    touch(tmp_path, ".cache/a/1.jpg")
    assert [entry.name for entry in ImageFolder(tmp_path / ".cache")] == ["a/1.jpg"]


def test_class_folders_are_numbered_in_natural_order(tmp_path: Path) -> None:
    touch(tmp_path, "10/1.jpg", "2/1.jpg", "0/1.jpg")
    folders = ClassFolders(tmp_path)
    assert folders.classes == ("0", "2", "10")
    assert {e.name: e.cls for e in folders if isinstance(e, Entry)} == {
        "0/1.jpg": 0, "2/1.jpg": 1, "10/1.jpg": 2,
    }  # fmt: skip


def test_a_class_folder_of_any_bytes_has_a_name_in_utf8(tmp_path: Path) -> None:
    touch(tmp_path, os.fsdecode(b"caf\xe9/1.jpg"), "dog/2.jpg")
    folders = ClassFolders(tmp_path)
    assert folders.classes == ("caf\\xe9", "dog")
    entries = [entry for entry in folders if isinstance(entry, Entry)]
    assert sorted(entry.cls for entry in entries if entry.cls is not None) == [0, 1]
    assert all(isinstance(e.image, Path) and e.image.is_file() for e in entries)
