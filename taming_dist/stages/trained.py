"""What both stages share: one model under an engine, which is measured and exported.

How it is trained and what is drawn of it is in `stages.codebook` and `stages.prior`.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor

from taming_dist.engine.zero import Engine
from taming_dist.models.export import Exported
from taming_dist.stages.setup import Setup
from taming_dist.training.clock import Clock
from taming_dist.training.export import write_export
from taming_dist.training.optimization import seed_step


class Figures(Protocol):
    """Sums over a validation set, and what follows from them (taming_dist/evaluation)."""

    sums: Tensor

    def update(self, *args: Any, **kwargs: Any) -> None: ...
    def compute(self) -> dict[str, float]: ...


class ModelRecipe:
    """A recipe but for its step and its pictures."""

    model_class: ClassVar[type[Exported]]
    engine_name: ClassVar[str]

    def __init__(
        self, config: Any, setup: Setup, initial: Mapping[str, Tensor] | None = None
    ) -> None:
        """`config`: that of the model; `initial`: the weights to start from, instead of random
        ones."""
        self.setup, self.world = setup, setup.world
        model = setup.build(lambda: self.model_class(config), setup.seed, initial)
        self.engine = setup.start(model, self._groups(model), setup.optim.ema_half_life)

    def _groups(self, model: Any) -> list[dict[str, Any]] | None:
        """Parameter groups of the optimizer; None for one group of all."""
        return None

    @property
    def engines(self) -> Mapping[str, Engine]:
        return {self.engine_name: self.engine}

    def _begin_step(self, clock: Clock) -> None:
        """Seeds and learning rates."""
        seed_step(self.setup.seed, clock, self.world.rank)
        for engine in self.engines.values():
            engine.set_lr(self.setup.optim.learning_rate(clock))

    @torch.no_grad()
    def validate(self, batches: Iterable[tuple[Any, bool]]) -> dict[str, float]:
        figures = self._figures()
        figures.sums = figures.sums.to(self.world.device)
        images = torch.zeros((), dtype=torch.float64, device=self.world.device)
        with self.engine.evaluated() as model:
            for batch, counts in batches:
                with self.engine.autocast():
                    measured = self._measured(model, batch)
                if counts:
                    figures.update(*measured)
                    images += len(batch)
        self.world.sum(figures.sums)
        found = {name.removeprefix("val_"): value for name, value in figures.compute().items()}
        return found | {"images": float(self.world.sum(images))}

    def _figures(self) -> Figures:
        """What is measured on the validation set."""
        raise NotImplementedError

    def _measured(self, model: Any, batch: Any) -> tuple[Tensor, ...]:
        """What the figures take in of a batch."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass

    def export(self, folder: Path) -> None:
        state = self.engine.full_state()
        if state is not None:
            write_export(self.model_class, self.engine.module.config, state, folder)
