"""Units of work: consecutive images that one rank makes, and what is kept of an unfinished one."""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from taming_dist.formats.files import write_bytes

KEEP_PERIOD_S = 30.0


@dataclass
class Unit:
    """The images of a run that are made together; `kept` is the file for what would be lost.

    What takes long (one large image) keeps its state now and then and finds it again after a stop.
    """

    number: int
    images: range
    kept: Path
    told: Callable[[float], None] = lambda done: None

    def __post_init__(self) -> None:
        self._saved = time.monotonic()

    def resumed(self) -> dict[str, Tensor]:
        """What was kept when this unit was stopped; empty if nothing was."""
        try:
            return load_file(self.kept)
        except (OSError, SafetensorError):
            return {}

    def keep(self, done: float, state: Callable[[], Mapping[str, Tensor]]) -> None:
        """Tell how much of the unit is done, 0 to 1, and now and then keep its `state`, tensors by
        name, so that it can be continued from there. To be called as often as is convenient."""
        self.told(done)
        if time.monotonic() - self._saved >= KEEP_PERIOD_S:
            tensors = {name: own.detach().cpu().contiguous() for name, own in state().items()}
            write_bytes(self.kept, save(tensors))
            self._saved = time.monotonic()


def units_of(n: int, size: int, folder: Path) -> Iterator[Unit]:
    """The units of n images, `size` in each; what they keep lies in `folder`."""
    for number, start in enumerate(range(0, n, size)):
        images = range(start, min(start + size, n))
        yield Unit(number, images, folder / f"{number:06d}.kept.safetensors")
