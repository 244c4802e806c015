"""Texts of images: captions, and their embeddings as fixed numbers of vectors.

An embedding is float16 [tokens, width], its vectors in the order of the text; those behind the
text's end are all zero, which is how its length is known. Does not import torch: the decoding
process reads them.
"""

import json
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np

from taming_dist.data.fetching import Shards
from taming_dist.errors import UserError
from taming_dist.formats.faults import BrokenData
from taming_dist.formats.manifest import Dataset
from taming_dist.formats.npy import from_npy
from taming_dist.formats.shards import read_sample

ARRAYS = ("txt.npy", "emb.npy")  # columns of image shards that hold embeddings
CAPTION = "txt"  # the column of image shards that holds a caption as a file of its own
MAX_CAPTION = 2**16  # bytes
Files = Mapping[str, memoryview]


def text_of(files: Files, column: str) -> Any:
    """A sample's text in a column: an embedding, or the first of its captions (`CAPTION`, or the
    field `column` of its JSON, a text or a list of them).

    Raises:
        BrokenData: it has none.
    """
    if column in ARRAYS:
        return _embedding(files, column)
    if column == CAPTION:
        return _printed(bytes(_need(files, CAPTION)))
    try:
        found = json.loads(bytes(_need(files, "json")))[column]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BrokenData(f"its json has no {column!r} ({error!r})") from error
    first = found[0] if isinstance(found, list) and found else found
    if not isinstance(first, str) or not first.strip():
        raise BrokenData(f"{column!r} of its json is neither a text nor a list of texts")
    return first.strip()


def reader_of(column: str, shape: tuple[int, int] | None = None) -> Callable[[Files], Any]:
    """`text_of` for a column; can be pickled. `shape`: that of each embedding."""
    return partial(_text_of_shape, column=column, shape=shape)


def _text_of_shape(files: Files, column: str, shape: tuple[int, int] | None) -> Any:
    found = text_of(files, column)
    if column in ARRAYS and shape is not None and found.shape != shape:
        raise BrokenData(f"its .{column} is {list(found.shape)}, others are {list(shape)}")
    return found


def _embedding(files: Files, column: str) -> np.ndarray:
    try:
        found = from_npy(memoryview(_need(files, column)))
    except BrokenData as error:
        raise BrokenData(f"its .{column} is damaged ({error})") from error
    if found.dtype != np.float16 or found.ndim != 2 or not found.size:
        raise BrokenData(f"its .{column} is {found.dtype} {list(found.shape)}, not float16 [t, w]")
    if not np.isfinite(found).all():
        raise BrokenData(f"its .{column} has numbers that are not finite")
    return found


def _printed(data: bytes) -> str:
    try:
        text = data[:MAX_CAPTION].decode().strip()
    except UnicodeDecodeError as error:
        raise BrokenData("its .txt is not UTF-8") from error
    if not text:
        raise BrokenData("its .txt is empty")
    return text.split("\n")[0].strip()


def _need(files: Files, extension: str) -> memoryview:
    if extension not in files:
        raise BrokenData(f"no .{extension} among {', '.join(sorted(files)) or 'its files'}")
    return files[extension]


def find_embeddings(dataset: Dataset) -> str | None:
    """The column of embeddings that every sample has; None if there is none."""
    return next((c for c in ARRAYS if dataset.columns.get(c, 0) == dataset.num_samples), None)


def check_texts(dataset: Dataset, column: str, asker: str) -> Any:
    """The text of the first sample.

    Raises:
        UserError: not every sample has a file that may hold one, or the first has none; `asker` is
            what reads them.
    """
    extension = column if column in (*ARRAYS, CAPTION) else "json"
    count, everyone = dataset.columns.get(extension, 0), dataset.num_samples
    shards = Shards(dataset)
    folder = shards.location(0)
    if count < everyone:
        raise UserError(
            f"{asker}: {count} of {everyone} samples of {folder} and its like have a .{extension}: "
            f"make the shards with it (docs/making-shards.md)"
        )
    try:
        return text_of(read_sample(shards.read(0, 0, 1)[0])[1], column)
    except BrokenData as error:
        raise UserError(f"{asker}: {error} (the first sample of {folder})") from error
