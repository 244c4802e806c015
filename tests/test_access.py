"""Modes are looked at as they are, and what may not be read by another user, for the tests may run
as root, whom modes do not bind."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from taming_dist.access import require_readable, usual_mode
from taming_dist.engine.pieces import Piece, write_pieces
from taming_dist.models.quantizers.vector import VectorQuantizerConfig
from taming_dist.models.vqgan import VQGAN, VQGANConfig
from taming_dist.taming_compat.files import write_tensors
from taming_dist.training.export import write_export

NOBODY = 65534


@pytest.fixture(params=[0o002, 0o077], ids=["for the group", "for oneself"])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def modes(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mode & 0o777 for path in (folder, *folder.iterdir())}


def export(folder: Path) -> Path:
    quantizer = VectorQuantizerConfig(codes=8, dim=4)
    model = VQGAN(VQGANConfig(channels=32, multipliers=[1, 1], resolution=16, quantizer=quantizer))
    write_export(VQGAN, model.config, model.state_dict(), folder)
    return folder


def test_exports_and_tensors_follow_the_umask(tmp_path: Path, umask: int) -> None:
    export(tmp_path / "export")
    files = dict.fromkeys(("README.md", "config.json", "model.safetensors"), 0o666 & ~umask)
    assert modes(tmp_path / "export") == {"export": 0o777 & ~umask, **files}
    write_tensors({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    (written,) = write_pieces(tmp_path, [Piece("a", 0, torch.ones(2))], 0, 1)
    for name in ("a.safetensors", written):
        assert (tmp_path / name).stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_file_that_is_written_anew_keeps_its_mode(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    file.chmod(0o604)
    with usual_mode(file):
        file.unlink()
        file.touch(0o600)
    assert file.stat().st_mode & 0o777 == 0o604


AS_NOBODY = """
import os, sys
from pathlib import Path
from taming_dist.formats.manifest import resolve
from taming_dist.errors import UserError
from taming_dist.taming_compat.files import read_tensors
from taming_dist.models.quantizers.vector import VectorQuantizerConfig
from taming_dist.models.vqgan import VQGAN
os.setgroups([]); os.setgid({nobody}); os.setuid({nobody})
folder = Path(sys.argv[1])
for read in (
    lambda: VQGAN.from_pretrained(str(folder / "open")).kind,
    lambda: VQGAN.from_pretrained(str(folder / "closed" / "export")),
    lambda: VQGAN.from_pretrained(str(folder / "private")),
    lambda: read_tensors(folder / "private" / "model.safetensors"),
    lambda: resolve(str(folder / "closed")),
    lambda: resolve(str(folder / "closed" / "train-{{000..001}}.tar")),
    lambda: resolve(str(folder / "closed" / "*.tar")),
    lambda: resolve(str(folder / "shards")),
):
    try:
        print(read())
    except UserError as error:
        print(error)
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_what_may_not_be_read_is_not_called_missing(tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as name:
        folder = Path(name)
        folder.chmod(0o755)
        for part in ("open", "private", "closed/export"):
            export(folder / part)
        (folder / "private" / "model.safetensors").chmod(0o600)
        (folder / "closed").chmod(0o700)
        (folder / "shards").mkdir()
        (folder / "shards" / "manifest.json").touch(0o600)
        command = [sys.executable, "-c", AS_NOBODY.format(nobody=NOBODY), name]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.stderr == ""
        readable, *refused = done.stdout.splitlines()
    assert readable == "vqgan"
    paths = ("closed/export", "private/model.safetensors", "private/model.safetensors", "closed",
             "closed", "closed", "shards/manifest.json")  # fmt: skip
    for line, path in zip(refused, paths, strict=True):
        assert line.startswith(f"no permission to read {folder / path}"), line
    require_readable(tmp_path / "missing")  # which is told where it is needed
