"""Tensors of an engine on disk, by name and in flat pieces, so that any cut can read any other.

A rank writes what it holds into files of its own, `rank-00003-of-00008.000.safetensors` and so on;
the key `weights/head.weight@4096` is the piece of the flat tensor that starts at its element 4096.
A reader looks into the files of its own rank first: a run that resumes as it was finds everything
there, any other goes through the headers of all files. Nothing is pickled.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from taming_dist.access import usual_mode
from taming_dist.errors import UserError

LARGEST_FILE = 2**30  # bytes; what is being written lies in memory once more


class Piece(NamedTuple):
    """A flat part [n] of a tensor that begins at element `first` of it."""

    name: str
    first: int
    values: Tensor


class _Stored(NamedTuple):
    """Where a piece lies: elements [first, first + length) under `key` of the `number`-th file."""

    number: int
    key: str
    first: int
    length: int


def write_pieces(folder: Path, pieces: Iterable[Piece], rank: int, world_size: int) -> list[Path]:
    """Write the pieces that a rank holds into the folder, which is there; gives the files."""
    waiting: dict[str, Tensor] = {}
    files: list[Path] = []
    size = 0

    def write() -> None:
        path = folder / f"rank-{rank:05d}-of-{world_size:05d}.{len(files):03d}.safetensors"
        with usual_mode(path):
            save_file(waiting, path)
        files.append(path)

    for piece in pieces:
        # a copy: pieces may be views of one buffer, which safetensors refuses
        values = piece.values.detach().to("cpu", copy=True)
        if waiting and size + values.nbytes > LARGEST_FILE:
            write()
            waiting, size = {}, 0
        waiting[f"{piece.name}@{piece.first}"] = values
        size += values.nbytes
    if waiting:
        write()
    return files


class Pieces:
    """The tensors that all ranks of a run have written into a folder, as flat ones by name."""

    def __init__(self, folder: Path, rank: int) -> None:
        own = f"rank-{rank:05d}-"
        files = sorted(folder.glob("rank-*.safetensors"), key=lambda path: path.name)
        self.folder = folder
        self._files = sorted(files, key=lambda path: not path.name.startswith(own))
        self._open: list[Any] = []  # those whose headers have been read, the first of them
        self._stored: dict[str, list[_Stored]] = {}
        self._read_headers(sum(path.name.startswith(own) for path in files))

    def __contains__(self, name: str) -> bool:
        """Whether there is any piece of a tensor."""
        if name not in self._stored:
            self._read_headers(len(self._files))
        return name in self._stored

    @torch.no_grad()
    def fill(self, name: str, first: int, into: Tensor) -> None:
        """Copy the elements of a tensor from `first` on into a flat one [n].

        Raises:
            UserError: some of them are not there.
        """
        missing = self._fill(name, first, into)
        if missing and len(self._open) < len(self._files):
            self._read_headers(len(self._files))
            missing = self._fill(name, first, into)
        if missing:
            raise UserError(
                f"{self.folder}: {missing} of the {into.numel()} numbers of {name} from {first} on "
                f"are missing: its model is another than this run's, or the checkpoint is broken"
            )

    def _fill(self, name: str, first: int, into: Tensor) -> int:
        """Fill in what is known; gives how many elements are missing. Pieces do not overlap."""
        end, missing = first + into.numel(), into.numel()
        for stored in self._stored.get(name, ()):
            start, stop = max(first, stored.first), min(end, stored.first + stored.length)
            if start >= stop:
                continue
            part = self._open[stored.number].get_slice(stored.key)
            values = part[start - stored.first : stop - stored.first]
            into[start - first : stop - first].copy_(values)
            missing -= stop - start
        return missing

    def _read_headers(self, count: int) -> None:
        """Know the pieces of the first `count` files."""
        for path in self._files[len(self._open) : count]:
            try:
                file = safe_open(path, framework="pt")
                for key in file.keys():  # noqa: SIM118  it is no mapping
                    name, _, first = key.rpartition("@")
                    (length,) = file.get_slice(key).get_shape()
                    found = _Stored(len(self._open), key, int(first), length)
                    self._stored.setdefault(name, []).append(found)
            except (SafetensorError, ValueError) as error:
                raise UserError(f"{path} is no file of a checkpoint's tensors ({error})") from error
            self._open.append(file)
