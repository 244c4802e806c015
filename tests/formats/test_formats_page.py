"""The examples of docs/data-formats.md are run as they stand."""

import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from taming_dist.formats.code_shards import CodeShard

PAGE = Path(__file__).parents[2] / "docs" / "data-formats.md"


def example(first_line: str) -> str:
    text = PAGE.read_text()
    block = text[text.index(f"    {first_line}\n") :]
    lines = []
    for line in block.splitlines():
        if line and not line.startswith("    "):
            break
        lines.append(line)
    return textwrap.dedent("\n".join(lines))


@pytest.fixture
def codes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    array = np.arange(24, dtype=np.uint16).reshape(4, 1, 2, 3)
    facts = {"vocab": 24, "tokenizer": {"fingerprint": "f"}}
    shard = CodeShard(facts, array, np.arange(4), list("abcd"), np.arange(4, dtype=np.int32))
    shard.save(tmp_path / "codes-train-000000.tar")
    monkeypatch.chdir(tmp_path)
    return array


@pytest.mark.parametrize("first_line", ["import webdataset as wds", "import tarfile"])
def test_the_example_reads_the_codes(codes: np.ndarray, first_line: str) -> None:
    names: dict[str, Any] = {}
    exec(example(first_line), names)
    assert np.array_equal(names["codes"], codes)
