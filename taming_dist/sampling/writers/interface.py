"""What a writer is: pictures of a unit in, files out; then all units together."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from taming_dist.sampling.picture import Picture


@dataclass(frozen=True)
class Finished:
    """A unit whose pictures are stored: its number, their height and width, and what is said of
    each, in order."""

    number: int
    size: tuple[int, int]
    images: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Writer(ABC):
    """Storage of the pictures of a run in `out`; `parts` is a folder on the same disk for what is
    to be put together, `worker` names this process in temporary files. `text`: what picture k says
    in itself. A unit may be written twice, by two workers at once or after a stop: the bytes are
    the same."""

    out: Path
    parts: Path
    worker: str
    text: Callable[[int], str]

    pattern: ClassVar[str]  # of the names of its files

    @staticmethod
    @abstractmethod
    def file(index: int) -> str:
        """The name of the file that picture `index` is in."""

    @abstractmethod
    def write(self, number: int, pictures: Iterable[Picture]) -> None:
        """Store the pictures of unit `number`; when it returns they are safe."""

    @abstractmethod
    def finish(self, units: Iterable[Finished]) -> None:
        """Put the units together, all of which are stored; called again after a stop."""
