"""How a run's pictures are stored: `format=` is one of WRITERS; a format is one class."""

from taming_dist.sampling.writers.interface import Finished, Writer
from taming_dist.sampling.writers.npz import NpzWriter
from taming_dist.sampling.writers.png import PngWriter
from taming_dist.sampling.writers.shards import ShardWriter

WRITERS: dict[str, type[Writer]] = {
    "png": PngWriter,
    "npz": NpzWriter,
    "shards": ShardWriter,
}

__all__ = ["WRITERS", "Finished", "Writer"]
