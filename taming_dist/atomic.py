"""Files that are written whole or not at all. Nothing heavy is imported here."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


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
