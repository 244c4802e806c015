"""What the training loop knows of a stage: a small protocol, kept by taming_dist/stages."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from taming_dist.engine.zero import Engine
from taming_dist.training.clock import Clock
from taming_dist.training.export import Export
from taming_dist.training.metrics import Metrics

Scalars = dict[str, Tensor]
Measured = Mapping[str, float | list[float]]  # by name: a number, or the numbers of a curve

# The curve of a first stage's validation that says how often each code of the codebook was used.
CODE_COUNTS = "codebook_counts"


def numbers(record: Measured) -> dict[str, float]:
    """What a record has but for its curves."""
    return {name: value for name, value in record.items() if not isinstance(value, list)}


@dataclass(frozen=True)
class Preview:
    """A picture of the present state, uint8 [3,h,w]: rows of images, and what each row shows."""

    picture: Tensor
    rows: tuple[str, ...]

    @property
    def caption(self) -> str:
        """What the rows show, from the top."""
        return "; ".join(self.rows)


class Pictures(NamedTuple):
    """What a model has `made`, and what gives the `real` images that it compares with, which are
    always the same: uint8 [b,3,h,w] each, on the device; `ids`: the numbers int64 [b] of these in
    the data set."""

    made: Tensor
    real: Callable[[], Tensor]
    ids: Tensor


class Recipe(Protocol):
    """One stage of training. All ranks call every method together."""

    @property
    def engines(self) -> Mapping[str, Engine]:
        """The trained networks by the name of their folder in a checkpoint, first the one that is
        exported."""
        ...

    def train_step(self, micro_batches: Iterable[Any], clock: Clock) -> Iterable[Scalars]:
        """One optimizer step; gives the scalars of each micro-batch, on the device."""
        ...

    def depends_on_the_cut(self) -> str | None:
        """What of a step depends on how its images are cut into ranks and micro-batches, by more
        than rounding; None if nothing does."""
        ...

    def window_metrics(self) -> Metrics:
        """Metrics over everything since the last call, already over all ranks; on the device
        what is known there."""
        ...

    def validate(self, batches: Iterable[tuple[Any, bool]]) -> Measured:
        """Metrics over the validation set, and how many `images` they cover. A batch with False
        beside it only keeps ranks in step and does not count."""
        ...

    def pictures(self, batches: Iterable[tuple[Any, bool]]) -> Iterator[Pictures]:
        """What the model makes of the same batches that `validate` is given, and what it is to be
        like."""
        ...

    def preview(self, batch: Any) -> Preview | None:
        """A picture of the present state on a fixed batch, on the first rank; None where there is
        nothing to draw."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What the recipe itself must remember, as plain JSON."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def export(self) -> Export | None:
        """The trained model for use without training code, on the first rank."""
        ...
