"""Which checkpoints there are in a folder, and what is wrong with those that are not whole."""

import math
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from taming_dist.engine.meta import FORMER, read_meta
from taming_dist.engine.pieces import PIECES, pieces_of
from taming_dist.engine.snapshot import not_finite
from taming_dist.engine.written import Written
from taming_dist.errors import UserError
from taming_dist.formats.shards import measure

ASIDE = ".former"  # behind the name of one that stepped aside for another of the same images
NAME = re.compile(r"images-(\d{12,})(\.former)?")
NAME_OF_BEFORE = re.compile(r"step-(\d{8,})")
UNFINISHED = ("images-*.tmp", "step-*.tmp")


def all_checkpoints(folder: Path) -> list[Path]:
    """The checkpoint folders of a run, whole or not, by images seen."""
    if not folder.is_dir():
        return []
    names = (NAME, NAME_OF_BEFORE)
    found = (path for path in folder.iterdir() if any(name.fullmatch(path.name) for name in names))
    return sorted(found, key=_age)


def _age(path: Path) -> tuple[float, int]:
    """What sorts checkpoints; of the same images one of before comes first, one that stepped aside
    next."""
    match = NAME.fullmatch(path.name)
    return _images(path), 0 if match is None else 1 if match[2] else 2


def remove_unfinished(folder: Path) -> None:
    """Delete what runs that died while saving have left: each is as large as a checkpoint."""
    for pattern in UNFINISHED:
        for path in folder.glob(pattern):
            shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob(f"images-*{ASIDE}"):
        if find_fault(path.with_name(path.name.removesuffix(ASIDE))) is None:
            remove(path)


def newest_valid(folder: Path, report: Callable[[str], None]) -> Path | None:
    """The newest whole checkpoint in `folder`; broken newer ones are reported."""
    return next(whole_checkpoints(folder, report), None)


def whole_checkpoints(folder: Path, report: Callable[[str], None]) -> Iterator[Path]:
    """Yield the checkpoints in `folder` whose files are all there, the newest first; broken ones
    are reported."""
    for path in reversed(all_checkpoints(folder)):
        fault = find_fault(path)
        if fault is None:
            yield path
        else:
            report(f"skipping checkpoint {path.name}: {fault}")


def read_state(path: Path, world_size: int) -> dict[str, Any]:
    """The state in a checkpoint; UserError if it is of before and only as many ranks as wrote it
    can read it."""
    meta = read_meta(path)
    if meta.format == FORMER and meta.world_size != world_size:
        raise UserError(
            f"{path} was written by a former version on {meta.world_size} ranks, and this run "
            f"is on {world_size}: resume once on {meta.world_size}; what that saves any number "
            f"can read"
        )
    return meta.state


def find_fault(path: Path) -> str | None:
    """Why a checkpoint is not whole, or None."""
    try:
        files = read_meta(path).files
    except FileNotFoundError:
        return "it has no meta.json"
    except (OSError, ValueError) as error:
        return f"meta.json is damaged ({error})"
    for name, facts in files.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != facts.bytes:
            return f"{name} has {file.stat().st_size} bytes instead of {facts.bytes}"
    return None


def find_fault_within(file: Path, facts: Written) -> str | None:
    """What is wrong with the contents of a file of a checkpoint, or None. (Of those of before only
    the size is known.)"""
    if not facts.xxh3_128:
        return None
    try:
        if measure(file)[1] != facts.xxh3_128:
            return "was altered: its xxh3 is not the one in meta.json"
        tensor = not_finite(pieces_of(file)) if file.suffix == PIECES else None
    except (OSError, SafetensorError) as error:
        return f"cannot be read ({error})"
    return None if tensor is None else f"holds {tensor}, which is not finite"


def _images(path: Path) -> float:
    """Images seen. A folder of before whose meta.json cannot be read may be the newest: infinity,
    so that it is reported rather than passed over in silence."""
    match = NAME.fullmatch(path.name)
    if match is not None:
        return int(match[1])
    try:
        return read_meta(path).state["images"]
    except (OSError, ValueError):
        return math.inf


def remove(path: Path) -> None:
    """Delete a checkpoint: it is gone at once, and if this is cut, the next start does the rest."""
    going = path.with_name(f"{path.name}.tmp")
    with suppress(OSError):  # of which a save need not fail
        if path.exists():
            shutil.rmtree(going, ignore_errors=True)
            os.rename(path, going)
            shutil.rmtree(going, ignore_errors=True)
