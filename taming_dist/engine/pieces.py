"""Tensors of an engine on disk, by name and in flat pieces, so that any cut can read any other.

A rank writes what it holds into files of its own, `rank-00003-of-00008.000.safetensors` and so on;
the key `weights/head.weight@4096` is the piece of the flat tensor that starts at its element 4096.
A reader looks into the files of its own rank first: a run that resumes as it was finds everything
there, any other goes through the headers of all files. Nothing is pickled.
"""

import json
import struct
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from taming_dist.engine.written import Written, write_file
from taming_dist.errors import UserError

PIECES = ".safetensors"  # how the names of its files end
LARGEST_FILE = 2**30  # bytes; a rank that looks at a share of the files looks at whole ones
BLOCK = 2**26  # bytes of memory
ALIGNMENT = 8  # bytes, the largest number of any dtype
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


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


def copied(pieces: Iterable[Piece]) -> list[Piece]:
    """Copies of pieces in the CPU's memory: what happens to the tensors afterwards does not reach
    them. The host waits until they are there.

    They share blocks of memory, and a piece that does not fit into the rest of one is cut. Copies
    of what is on a GPU lie in pinned blocks: torch keeps those that are freed for the next time,
    and would round up any other size.
    """
    given = [piece._replace(values=piece.values.detach().reshape(-1)) for piece in pieces]
    pin = any(piece.values.is_cuda for piece in given)
    left = sum(_aligned(piece.values.nbytes) for piece in given)
    block, copies = torch.empty(0, dtype=torch.uint8), []
    for name, start, values in given:
        done = 0
        while done < values.numel():
            if not len(block):
                block = torch.empty(min(left, BLOCK), dtype=torch.uint8, pin_memory=pin)
                left -= len(block)
            count = min(values.numel() - done, len(block) // values.itemsize)
            size = count * values.itemsize
            copy = block[:size].view(values.dtype)
            copy.copy_(values[done : done + count], non_blocking=pin)
            copies.append(Piece(name, start + done, copy))
            block = block[_aligned(size) :]
            done += count
    if pin:
        torch.cuda.current_stream().synchronize()
    return copies


def _aligned(size: int) -> int:
    """A size in bytes, so that after it a number of any dtype may begin."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def write_pieces(
    folder: Path, pieces: Iterable[Piece], rank: int, world_size: int
) -> dict[str, Written]:
    """Write the pieces that a rank holds, in the CPU's memory, into the folder, which is there;
    gives the files by name."""
    files: dict[str, Written] = {}
    waiting: list[Piece] = []
    size = 0

    def write() -> None:
        name = f"rank-{rank:05d}-of-{world_size:05d}.{len(files):03d}{PIECES}"
        files[name] = write_tensors(folder / name, waiting)

    for piece in pieces:
        if waiting and size + piece.values.nbytes > LARGEST_FILE:
            write()
            waiting, size = [], 0
        waiting.append(piece)
        size += piece.values.nbytes
    if waiting:
        write()
    return files


def write_tensors(path: Path, pieces: Iterable[Piece]) -> Written:
    """Write a safetensors file. (The library's own writer would copy all of it first, while no
    other thread could run, and hash nothing.) Source: the format's description in
    huggingface/safetensors; the largest dtypes come first, so that all are aligned."""
    ordered = sorted(pieces, key=lambda piece: -piece.values.itemsize)
    header, end = {}, 0
    for name, first, values in ordered:
        begin, end = end, end + values.nbytes
        header[f"{name}@{first}"] = {
            "dtype": DTYPES[values.dtype],
            "shape": [values.numel()],
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":"), allow_nan=False).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    data = (piece.values.view(torch.uint8).numpy().data for piece in ordered)
    return write_file(path, chain([struct.pack("<Q", len(text)), text], data))


def pieces_of(path: Path) -> Iterator[Piece]:
    """Read the pieces in a file, one at a time."""
    with safe_open(path, framework="pt") as file:
        for key in file.keys():  # noqa: SIM118  it is no mapping
            name, _, first = key.rpartition("@")
            yield Piece(name, int(first), file.get_tensor(key))


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
