"""The error lines for folders that cannot be written."""

import errno
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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
