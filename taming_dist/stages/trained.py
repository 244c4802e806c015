"""A model under its engine, as every stage has one: how it is built, validated and exported.

A recipe has one of these and adds its step (`stages.vqgan`, `stages.label_maps`, `stages.prior`).
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from taming_dist.engine.zero import Engine
from taming_dist.models.export import Exported
from taming_dist.stages.context import Context
from taming_dist.training.clock import Clock
from taming_dist.training.export import Export
from taming_dist.training.optimization import seed_step
from taming_dist.training.recipe import Measured

ParameterGroups = Callable[[Any], list[dict[str, Any]]]


class ValidationMetrics(Protocol):
    """Sums over a validation set, and what follows from them (taming_dist/evaluation)."""

    sums: Tensor

    def update(self, *args: Any, **kwargs: Any) -> None: ...
    def compute(self) -> Measured: ...


class Trained:
    """A model of a kind and its config; `engine` trains it."""

    def __init__(
        self,
        kind: type[Exported],
        config: Any,
        context: Context,
        initial: Mapping[str, Tensor] | None = None,
        groups: ParameterGroups | None = None,
        make: Callable[[], Exported] | None = None,
    ) -> None:
        """`initial`: the weights to start from, instead of random ones; `groups`: the optimizer's
        parameter groups of the model, one of all parameters without it; `make`: what makes the
        model, where it has submodules for training only."""
        self.kind, self.world = kind, context.world
        model = context.build(make or (lambda: kind(config)), context.seed, initial)
        model.freeze(context.freeze)
        chosen = None if groups is None else groups(model)
        self.engine = context.start(model, chosen, context.optim.ema_half_life)

    @torch.no_grad()
    def validate(
        self,
        batches: Iterable[tuple[Any, bool]],
        metrics: ValidationMetrics,
        measure: Callable[[Any, Any], tuple[Tensor, ...]],
    ) -> Measured:
        """The metrics of the batches that count, over all ranks, and how many `images` these have.

        `measure(model, batch)` gives what the metrics take in of a batch (collective).
        """
        metrics.sums = metrics.sums.to(self.world.device)
        images = torch.zeros((), dtype=torch.float64, device=self.world.device)
        with self.engine.evaluated() as model:
            for batch, counts in batches:
                with self.engine.autocast():
                    measured = measure(model, batch)
                if counts:
                    metrics.update(*measured)
                    images += len(batch)
        self.world.sum(metrics.sums)
        found = {name.removeprefix("val_"): value for name, value in metrics.compute().items()}
        return found | {"images": float(self.world.sum(images))}

    def export(self) -> Export | None:
        """The model for use without training code, on the first rank (collective)."""
        state = self.engine.full_state()
        if state is None:
            return None
        used = {n: t for n, t in state.items() if n.split(".")[0] not in self.kind.training_only}
        return Export(self.kind, self.engine.module.config, used)


def begin_step(engines: Mapping[str, Engine], context: Context, clock: Clock) -> None:
    """Seeds and learning rates of an optimizer step."""
    seed_step(context.seed, clock, context.world.rank)
    for engine in engines.values():
        engine.set_lr(context.optim.learning_rate(clock))
