"""File permissions: making our files readable as the umask says, and checking those of others."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from taming_dist.errors import UserError


@contextmanager
def usual_mode(path: str | os.PathLike[str]) -> Iterator[None]:
    """Give a file written within the block the mode of its predecessor, or of any new file.

    safetensors makes files readable by their owner only, whatever the umask.
    """
    with open(path, "ab") as file:
        mode = os.fstat(file.fileno()).st_mode
    yield
    os.chmod(path, mode & 0o777)


def require_readable(path: str | os.PathLike[str]) -> None:
    """Raise `UserError` for a local file or folder that we are not allowed to read.

    To be called before checking existence: a file in a folder that we may not enter is not missing.
    """
    try:
        is_folder = os.path.isdir(path)
        os.stat(path)
        needed = os.R_OK | os.X_OK if is_folder else os.R_OK
        allowed = os.access(path, needed)
    except PermissionError:
        allowed = False
    except OSError:  # it does not exist, which is reported where it is needed
        return
    if not allowed:
        raise UserError(
            f"no permission to read {os.fspath(path)}: ask its owner to run chmod -R a+rX on it "
            f"and chmod a+x on its parent folders"
        )
