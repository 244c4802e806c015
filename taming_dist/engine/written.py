"""Files of a checkpoint, each written once: synced, and hashed on the way to the disk."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import xxhash

CHUNK = 2**24  # bytes


@dataclass(frozen=True)
class Written:
    """The size of a file, and the xxh3 (hex) of what it should hold; empty: not known."""

    bytes: int
    xxh3_128: str = ""


def write_file(path: Path, parts: Iterable[bytes | memoryview]) -> Written:
    """Write a file, of bytes, and have it on the disk.

    What is hashed is what was given, so that an error on the way to the disk shows, too. Other
    threads run meanwhile.
    """
    digest, size = xxhash.xxh3_128(), 0
    with open(path, "wb") as file:
        for part in parts:
            for begin in range(0, len(part), CHUNK):
                chunk = part[begin : begin + CHUNK]
                file.write(chunk)
                digest.update(chunk)
            size += len(part)
        file.flush()
        os.fsync(file.fileno())
    return Written(size, digest.hexdigest())


def sync_folder(path: Path) -> None:
    """Have the names in a folder on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
