"""Readers of images from keywords alone."""

from typing import Any

from taming_dist.data.images import Preprocess
from taming_dist.data.reader import Reader, Reading
from taming_dist.formats.manifest import Dataset

OWN = ("lanes", "block", "most_evaluated", "extra", "encoders")


def reader_of(dataset: Dataset, preprocess: Preprocess, **options: Any) -> Reader:
    """A reader of what is for it and of what is for every reader, told apart."""
    own = {name: options.pop(name) for name in OWN if name in options}
    return Reader(dataset, Reading(preprocess, **options), **own)
