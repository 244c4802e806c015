"""Files that are written atomically, and the error lines for folders that cannot be written."""

import errno
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from safetensors import SafetensorError

from taming_dist.errors import UserError

# Why a writable folder stops accepting data, and what to do about it.
FIXES = {
    errno.ENOSPC: "make room on its disk",
    errno.EDQUOT: "make room within your quota",
    errno.EFBIG: "raise the limit on the size of files (ulimit -f)",
    errno.EROFS: "remount its disk for writing",
}
# Why a save may fail besides: those of others are told where they are met.
OTHER_FIXES = dict.fromkeys((errno.EACCES, errno.EPERM), "fix its permissions")
PROBE_BYTES = 2**20


@contextmanager
def writing(folder: Path, option: str = "") -> Iterator[None]:
    """Turn a full disk and the like, while writing to `folder`, into a `UserError` that names it.

    `option`: the option that chose the folder, as it is typed in front of it.
    """
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        cause = cause_of(error, folder)
        if cause is None or cause.errno not in FIXES:
            raise
        fault = unwritable(cause, folder)
        raise UserError(f"{option}{fault}, then run the same command again") from error


def unwritable(cause: OSError, folder: Path) -> str:
    """That a folder cannot be written, why, and what to do about it."""
    fix = (FIXES | OTHER_FIXES).get(cause.errno or 0, "look at its disk")
    return f"{folder} cannot be written ({cause.strerror or cause}): {fix}"


def cause_of(error: Exception, folder: Path) -> OSError | None:
    """The system's error behind a failure to write to `folder`; None if there is none."""
    if isinstance(error, OSError):
        return error
    told = re.search(r"\(os error (\d+)\)", str(error))  # safetensors and other Rust code
    if told is not None:
        return OSError(int(told[1]), os.strerror(int(told[1])))
    if "inline_container.cc" in str(error):
        # torch.save gives no reason. The file that it began is still there, so the disk is still as
        # full as it was.
        try:
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(bytes(PROBE_BYTES))
                file.flush()
        except OSError as reason:
            return reason
    return None


@contextmanager
def replacing(path: Path, writer: str = "", room: Path | None = None) -> Iterator[BinaryIO]:
    """Open `<path>.tmp` for writing and rename it to `path` when the block ends without an error.

    `writer` names the process if several may write the same file at once: their temporary files
    then differ, and the last rename wins. `room`: the folder of the temporary file, on the same
    disk, if it shall not lie beside `path`. On an error the temporary file is removed.
    """
    name = f"{path.name}.{writer}.tmp" if writer else f"{path.name}.tmp"
    temporary = (room or path.parent) / name
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_bytes(path: Path, data: bytes, writer: str = "") -> None:
    """Write a small file atomically."""
    with replacing(path, writer) as file:
        file.write(data)
