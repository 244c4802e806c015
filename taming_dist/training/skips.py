"""Optimizer steps that were skipped: what became of a step is told one step late, so that the host
never waits for the step that it has just begun. And steps that are passed over as asked for."""

import dataclasses
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from taming_dist.copies import fetch
from taming_dist.engine.world import World
from taming_dist.engine.zero import Engine
from taming_dist.errors import Diverged, UserError
from taming_dist.training.clock import Clock
from taming_dist.training.recipe import Scalars
from taming_dist.training.sinks import Sinks

LATE = 1  # step; the same on all ranks, for whom telling is a collective
MOST_SKIPPED = 25  # optimizer steps; the scale of fp16's losses comes all the way down in 16


@dataclasses.dataclass(frozen=True)
class Step:
    """An optimizer step; `told` gives, from the device, for every network whether it moved and
    whether its gradient was a spike, and for every micro-batch whether its scalars were finite."""

    clock: Clock
    micro_batches: list[Any]
    told: Callable[[], Tensor]


class Skips:
    """Tells of skipped steps, in their order, and ends a run that skips nothing but steps."""

    def __init__(
        self,
        engines: Mapping[str, Engine],
        keys: Callable[[Any], list[str]],
        sinks: Sinks,
        world: World,
    ) -> None:
        """`keys` gives the names of a batch's samples."""
        self._engines, self._keys, self._sinks, self._world = engines, keys, sinks, world
        self._in_a_row = dict.fromkeys(engines, 0)
        self._steps: deque[Step] = deque()

    def add(self, clock: Clock, micro_batches: list[Any], parts: list[Scalars]) -> Tensor:
        """Take in the step that was just begun; gives whether all networks moved, a flag on the
        device."""
        moved = torch.stack([engine.moved for engine in self._engines.values()])
        spiked = torch.stack([engine.spiked for engine in self._engines.values()])
        finite = torch.stack([is_finite(part) for part in parts])
        told = fetch(torch.cat([moved, spiked, finite]))
        self._steps.append(Step(dataclasses.replace(clock), micro_batches, told))
        return moved.all()

    def pass_over(self, clock: Clock) -> None:
        """Write a line for the step that was just passed over, as train.skip_samples has it."""
        self._sinks.event("skip", clock, networks=list(self._engines), cause="train.skip_samples")

    def tell(self, late: int) -> None:
        """Write a line for every skipped step but of the `late` newest steps (collective). Diverged
        if a network has skipped too many of them one after the other."""
        while len(self._steps) > late:
            self._tell(self._steps.popleft())

    def _tell(self, step: Step) -> None:
        flags: list[bool] = step.told().tolist()
        count = len(self._engines)
        moved = dict(zip(self._engines, flags[:count], strict=True))
        spiked = any(flags[count : 2 * count])
        for name in moved:
            self._in_a_row[name] = 0 if moved[name] else self._in_a_row[name] + 1
        if skipped := [name for name in moved if not moved[name]]:
            cause, keys = self._cause(step.micro_batches, flags[2 * count :])
            cause = "spike" if spiked and cause == "gradient" else cause
            self._sinks.event("skip", step.clock, networks=skipped, cause=cause, keys=keys)
        for name, in_a_row in self._in_a_row.items():
            if in_a_row >= MOST_SKIPPED:
                raise Diverged(
                    f"step {step.clock.step}: a loss or gradient of the {name} was not finite in "
                    f"{MOST_SKIPPED} steps in a row; events.jsonl has their samples. Try a smaller "
                    f"optim.lr, engine.precision=fp32 or optim.clip=1"
                )

    def _cause(self, micro_batches: list[Any], finite: list[bool]) -> tuple[str, list[str]]:
        """Why a step was skipped, and the keys of the samples that it may be due to (collective):
        those of micro-batches with a "loss" that is not finite, on any rank; if there are none it
        is a "gradient", to which the whole global batch has added (or a "spike" of it)."""
        samples = [self._keys(batch) for batch in micro_batches]
        guilty = [keys for keys, fine in zip(samples, finite, strict=True) if not fine]
        if found := list(chain.from_iterable(self._world.gather(guilty))):
            return "loss", sorted(chain(*found))
        return "gradient", sorted(chain(*chain(*self._world.gather(samples))))


def sample_ranges(texts: Iterable[str]) -> list[range]:
    """Ranges of samples, numbered as a run sees them, from texts such as "120000-121000" (the last
    does not belong to it).

    Raises:
        UserError: one is not such a text.
    """
    found = []
    for text in texts:
        first, _, last = text.partition("-")
        if not (first.isdecimal() and last.isdecimal() and int(first) < int(last)):
            raise UserError(
                f"train.skip_samples: {text!r} is not a range of samples: use [120000-121000] for "
                f"those that the run sees between 120000 and 121000 images"
            )
        found.append(range(int(first), int(last)))
    return found


def passes_over(skipped: list[range], clock: Clock) -> bool:
    """Whether the next step has one of the skipped samples."""
    first, end = clock.images, clock.images + clock.global_batch
    return any(part.start < end and first < part.stop for part in skipped)


def is_finite(scalars: Scalars) -> Tensor:
    """Whether all scalars of a micro-batch are, a flag on the device."""
    return torch.stack([value.detach().float() for value in scalars.values()]).isfinite().all()
