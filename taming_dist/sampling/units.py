"""Units of work: consecutive images that one rank makes, and what is kept of an unfinished one."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from taming_dist.atomic import write_bytes

KEEP_PERIOD_S = 30.0
KEPT = "kept.safetensors"


@dataclass
class Unit:
    """The images of a run that are made together; its state lies in `folder`.

    What takes long (one large image) keeps its state now and then and finds it again after a stop.
    """

    number: int
    images: range
    folder: Path
    told: Callable[[float], None] = lambda done: None

    def __post_init__(self) -> None:
        self._saved = time.monotonic()

    @property
    def name(self) -> str:
        """What it is claimed by."""
        return f"{self.number:06d}"

    def state(self, name: str) -> Path:
        """A file of the unit's own."""
        return self.folder / f"{self.name}.{name}"

    def resumed(self) -> dict[str, Tensor]:
        """What was kept when this unit was stopped; empty if nothing was."""
        try:
            return load_file(self.state(KEPT))
        except (OSError, SafetensorError):
            return {}

    def keep(self, done: float, state: Callable[[], Mapping[str, Tensor]]) -> None:
        """Tell how much of the unit is done, 0 to 1, and now and then keep its `state`, tensors by
        name, so that it can be continued from there. To be called as often as is convenient."""
        self.told(done)
        if time.monotonic() - self._saved >= KEEP_PERIOD_S:
            self.save(state())

    def save(self, state: Mapping[str, Tensor]) -> None:
        """Keep a state at once."""
        tensors = {name: own.detach().cpu().contiguous() for name, own in state.items()}
        write_bytes(self.state(KEPT), save(tensors))
        self._saved = time.monotonic()

    def forget(self) -> None:
        """Remove what was kept."""
        self.state(KEPT).unlink(missing_ok=True)


def units_of(n: int, size: int, folder: Path, wanted: range) -> list[Unit]:
    """The units of n images, `size` in each, that have some of the images `wanted`."""
    first, last = wanted.start // size, (wanted.stop - 1) // size
    return [
        Unit(number, range(number * size, min((number + 1) * size, n)), folder)
        for number in range(first, last + 1)
    ]
