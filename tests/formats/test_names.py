import random
from pathlib import Path

import numpy as np
import pytest

from taming_dist.formats.code_shards import CodeShard
from taming_dist.formats.names import escape, natural_order, printable
from taming_dist.formats.shards import TarWriter, read_sample, scan, walk
from tests.formats.test_formats_page import example


def raw_tar(path: Path, *names: bytes) -> bytes:
    """A tar of images whose names are these bytes."""
    with open(path, "wb") as file:
        tar = TarWriter(file)
        for number, name in enumerate(names):
            tar.add(name.decode("latin-1"), b"%d" % number)
        tar.finish()
    # The writer has encoded them as UTF-8: what differs is put back, with the sums of the headers.
    data = bytearray(path.read_bytes())
    for member in list(walk(memoryview(bytes(data)))):
        name = names[int(bytes(data[member.start : member.start + member.size]))]
        header = data[member.header : member.header + 512]
        header[:100] = name.ljust(100, b"\0")
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        data[member.header : member.header + 512] = header
    path.write_bytes(data)
    return bytes(data)


def test_an_escaped_name_is_utf8_of_one_line_and_gives_its_bytes_back() -> None:
    """As docs/data-formats.md has it, run as it stands there."""
    names: dict[str, object] = {"keys": []}
    signs = (b"\\", b"x", b"e", b"9", b"\xe9", "é".encode(), b"\n", b"/", b"\xff", b"\x7f", b"a")
    draw = random.Random(0)
    raw = [b"".join(draw.choices(signs, k=draw.randint(0, 9))) for _ in range(3000)]
    texts = [escape(name.decode("utf-8", "surrogateescape")) for name in raw]
    assert all(len(text.encode().splitlines()) <= 1 for text in texts)
    assert len(set(texts)) == len(set(raw))
    names["keys"] = texts
    exec(example("import re"), names)
    assert names["names"] == raw


def test_names_that_are_valid_stay_as_they_are() -> None:
    for name in ("a/b c", "é/日本", "a\\b", "\\x4", "\\xE9", ""):
        assert escape(name) == name


def test_what_is_printable_stays_so() -> None:
    assert printable("caf\udce9 \ud800 \\xe9") == "caf\\xe9 \\xed\\xa0\\x80 \\xe9"
    assert printable("caf\\xe9 é\n") == "caf\\xe9 é\n"


def test_numbers_in_names_are_sorted_by_value() -> None:
    names = ["10", "2", "0", "a10", "a2", "a", "A3", "a02b", "n01440764", "é", "9" * 5000]
    assert sorted(names, key=natural_order) == [
        "0", "2", "10", "9" * 5000, "A3", "a", "a2", "a02b", "a10", "n01440764", "é",
    ]  # fmt: skip


@pytest.mark.parametrize("name", [b"caf\xe9/1", b"a\\x41", b"two\nlines"])
def test_a_member_of_any_name_has_a_key_in_utf8_up_to_the_code_shard(
    tmp_path: Path, name: bytes
) -> None:
    data = raw_tar(tmp_path / "a.tar", name + b".png", b"other.png")
    assert scan(tmp_path / "a.tar")[0].samples == 2
    key, _ = read_sample(data[: 2 * 512])
    assert key == escape(name.decode("utf-8", "surrogateescape"))
    facts = {"vocab": 4, "tokenizer": {"fingerprint": "f"}}
    shard = CodeShard(facts, np.zeros((1, 1, 1, 1), np.uint16), np.arange(1), [key])
    shard.save(tmp_path / "codes.tar")
    (line,) = [
        bytes(memoryview((tmp_path / "codes.tar").read_bytes())[m.start :][: m.size])
        for m in walk(memoryview((tmp_path / "codes.tar").read_bytes()))
        if m.name.endswith("keys.txt")
    ]
    assert line.decode("utf-8") == f"{key}\n"
    assert list(CodeShard.open(tmp_path / "codes.tar").keys) == [key]


def test_keys_of_shards_made_before_they_were_escaped_are_read(tmp_path: Path) -> None:
    facts = {"vocab": 4, "tokenizer": {"fingerprint": "f"}}
    shard = CodeShard(facts, np.zeros((2, 1, 1, 1), np.uint16), np.arange(2), ["caf__", "b"])
    shard.save(tmp_path / "codes.tar")
    data = (tmp_path / "codes.tar").read_bytes()
    (tmp_path / "codes.tar").write_bytes(data.replace(b"caf__\nb\n", b"caf\xe9_\nb\n"))
    assert list(CodeShard.open(tmp_path / "codes.tar").keys) == ["caf\\xe9_", "b"]
