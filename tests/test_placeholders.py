import gzip
from collections.abc import Callable
from pathlib import Path

import pytest

from taming_dist.errors import UserError
from taming_dist.formats.manifest import Manifest, resolve
from taming_dist.formats.shards import scan
from taming_dist.models.vqgan import VQGAN
from taming_dist.placeholders import placeholder
from taming_dist.prepare.making.layers import Unfit, open_picture
from taming_dist.taming_compat.files import read_tensors
from tests.data.shard_files import writing_shards

POINTER = (
    b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4" * 64 + b"\nsize 980092370\n"
)
PAGE = b"\n<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>"
FILES = {
    "a Git LFS pointer, not {}: run git lfs pull": POINTER,
    "a web page [(]HTML[)], not {}: download the file itself": PAGE,
    "a compressed file, not {}: unpack it first": gzip.compress(b"what was meant"),
}


def read_export(file: Path) -> None:
    (file.parent / "config.json").write_text('{"kind": "vqgan"}')
    VQGAN.from_pretrained(file.parent)


READERS: dict[tuple[str, str], Callable[[Path], object]] = {
    ("last.ckpt", "a checkpoint"): read_tensors,
    ("model.ckpt.safetensors", "a checkpoint"): read_tensors,
    ("model.safetensors", "the weights of a model"): read_export,
    ("train-000000.tar", "a shard"): scan,
}


@pytest.mark.parametrize("message", FILES, ids=["pointer", "page", "gzip"])
@pytest.mark.parametrize(("name", "what"), READERS, ids=[name for name, _ in READERS])
def test_a_placeholder_is_called_what_it_is(
    tmp_path: Path, name: str, what: str, message: str
) -> None:
    file = tmp_path / name
    file.write_bytes(FILES[message])
    with pytest.raises(UserError, match=f"{name} is {message.format(what)}"):
        READERS[name, what](file)


def test_a_shard_whose_place_a_pointer_takes_is_not_called_cut(tmp_path: Path) -> None:
    with writing_shards(tmp_path, "train", 1) as write:
        write("a", {"jpg": b"picture"})
    (tmp_path / "train-000000.tar").write_bytes(POINTER)
    assert len(Manifest.load(tmp_path).shards) == 1
    with pytest.raises(UserError, match=r"train-000000.tar is a Git LFS pointer, not a shard: run"):
        resolve(str(tmp_path))


def test_an_image_whose_place_a_pointer_takes_is_left_out_for_that() -> None:
    with pytest.raises(Unfit) as caught:
        open_picture(POINTER)
    assert caught.value.reason.startswith("a Git LFS pointer, not an image")


def test_other_files_are_not_taken_for_placeholders() -> None:
    for start in (b"", b"PK\x03\x04", b"version 2", b"\xff\xd8\xff\xe0", b"<svg></svg>"):
        assert placeholder(start) is None
