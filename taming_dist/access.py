"""Who may read a file: others what we write, as the umask says, and we what others wrote."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from taming_dist.errors import UserError


@contextmanager
def usual_mode(path: str | os.PathLike[str]) -> Iterator[None]:
    """Around what writes a file: its mode is then that of any new file, or of the one before.

    safetensors writes files that nobody but their owner may read, whatever the umask.
    """
    with open(path, "ab") as file:
        mode = os.fstat(file.fileno()).st_mode
    yield
    os.chmod(path, mode & 0o777)


def require_readable(path: str | os.PathLike[str]) -> None:
    """Raise `UserError` for a file or folder of this machine that the system keeps from us.

    Asked before whether it is there: what lies in a folder that we may not enter is not missing.
    """
    try:
        is_folder = os.path.isdir(path)
        os.stat(path)
        needed = os.R_OK | os.X_OK if is_folder else os.R_OK
        allowed = os.access(path, needed)
    except PermissionError:
        allowed = False
    except OSError:  # it is not there, which is said where it is needed
        return
    if not allowed:
        raise UserError(
            f"no permission to read {os.fspath(path)}: have its owner run chmod -R a+rX on it, and "
            f"chmod a+x on the folders above"
        )
