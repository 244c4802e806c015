"""A model under its engine, as every stage has one: how it is built, validated and exported.

A recipe has one of these and adds its step (`stages.vqgan`, `stages.label_maps`, `stages.prior`).
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from taming_dist.engine.zero import Engine
from taming_dist.models.export import Exported
from taming_dist.stages.setup import Setup
from taming_dist.training.clock import Clock
from taming_dist.training.export import write_export
from taming_dist.training.optimization import seed_step

ParameterGroups = Callable[[Any], list[dict[str, Any]]]


class Figures(Protocol):
    """Sums over a validation set, and what follows from them (taming_dist/evaluation)."""

    sums: Tensor

    def update(self, *args: Any, **kwargs: Any) -> None: ...
    def compute(self) -> dict[str, float]: ...


class Trained:
    """A model of a kind and its config; `engine` trains it."""

    def __init__(
        self,
        kind: type[Exported],
        config: Any,
        setup: Setup,
        initial: Mapping[str, Tensor] | None = None,
        groups: ParameterGroups | None = None,
    ) -> None:
        """`initial`: the weights to start from, instead of random ones; `groups`: the optimizer's
        parameter groups of the model, one of all parameters without it."""
        self.kind, self.world = kind, setup.world
        model = setup.build(lambda: kind(config), setup.seed, initial)
        chosen = None if groups is None else groups(model)
        self.engine = setup.start(model, chosen, setup.optim.ema_half_life)

    @torch.no_grad()
    def validate(
        self,
        batches: Iterable[tuple[Any, bool]],
        figures: Figures,
        measure: Callable[[Any, Any], tuple[Tensor, ...]],
    ) -> dict[str, float]:
        """The figures of the batches that count, over all ranks, and how many `images` these have.

        `measure(model, batch)` gives what the figures take in of a batch (collective).
        """
        figures.sums = figures.sums.to(self.world.device)
        images = torch.zeros((), dtype=torch.float64, device=self.world.device)
        with self.engine.evaluated() as model:
            for batch, counts in batches:
                with self.engine.autocast():
                    measured = measure(model, batch)
                if counts:
                    figures.update(*measured)
                    images += len(batch)
        self.world.sum(figures.sums)
        found = {name.removeprefix("val_"): value for name, value in figures.compute().items()}
        return found | {"images": float(self.world.sum(images))}

    def export(self, folder: Path) -> None:
        """Write the model for use without training code (collective)."""
        state = self.engine.full_state()
        if state is not None:
            write_export(self.kind, self.engine.module.config, state, folder)


def begin_step(engines: Mapping[str, Engine], setup: Setup, clock: Clock) -> None:
    """Seeds and learning rates of an optimizer step."""
    seed_step(setup.seed, clock, setup.world.rank)
    for engine in engines.values():
        engine.set_lr(setup.optim.learning_rate(clock))
