import errno
import fcntl
import os
from pathlib import Path

import pytest

from taming_dist.errors import UserError
from taming_dist.prepare.making import lock as module
from taming_dist.prepare.making.lock import locking


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE_S", 0.1)


def test_a_folder_is_locked_once_and_leaves_no_trace(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "lock"
    for _ in range(2):
        with locking(path):
            with pytest.raises(UserError, match=f"another run .*process {os.getpid()} of "):
                locking(path).__enter__()
            with locking(tmp_path / "other" / "lock"):
                assert path.exists()
        assert not path.parent.exists()
        assert not (tmp_path / "other").exists()


def test_what_was_made_in_the_folder_stays(tmp_path: Path) -> None:
    with locking(tmp_path / "lock"):
        (tmp_path / "shard").touch()
    assert [path.name for path in tmp_path.iterdir()] == ["shard"]


def test_a_file_that_its_holder_removes_meanwhile_locks_nobody_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, real = tmp_path / "lock", fcntl.flock

    def late(descriptor: int, operation: int) -> None:
        monkeypatch.setattr(fcntl, "flock", real)
        path.unlink()  # between the opening of the file and its locking
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with locking(path), pytest.raises(UserError, match="another run"):
        locking(path).__enter__()


def test_a_file_system_without_locks_is_said_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(*_: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with locking(tmp_path / "a" / "lock"):
        assert "its file system has no locks" in capsys.readouterr().out
