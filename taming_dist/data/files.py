"""Files that appear whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def replacing(path: Path, writer: str = "") -> Iterator[BinaryIO]:
    """Open `<path>.tmp` for writing and rename it to `path` when the block ends well.

    `writer` names the process where several may write the same file at once; their temporary
    files then differ, and the last rename wins. On an error the temporary file is removed.
    """
    temporary = path.with_name(f"{path.name}.{writer}.tmp" if writer else f"{path.name}.tmp")
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
    """Write a small file so that it appears whole or not at all."""
    with replacing(path, writer) as file:
        file.write(data)
