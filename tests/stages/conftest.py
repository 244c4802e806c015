"""Recipes on a plain engine: one process, no DeepSpeed, gradients kept to be looked at."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from taming_dist.engine.settings import EngineConfig
from taming_dist.engine.world import World
from taming_dist.losses.terms import L1Config, L2Config, PerceptualConfig, TermConfig
from taming_dist.models.discriminators import PatchGANConfig
from taming_dist.models.modalities import LabelMap
from taming_dist.models.prior.conditions import ClassCondition
from taming_dist.models.prior.transformer import TransformerConfig
from taming_dist.models.quantizers import VectorQuantizerConfig
from taming_dist.models.vqgan import VQGANConfig
from taming_dist.stages.context import Context
from taming_dist.stages.label_maps import LabelMapLossConfig, LabelMapRecipe
from taming_dist.stages.prior import TokenLossConfig, TransformerRecipe
from taming_dist.stages.vqgan import VQGANLossConfig, VQGANRecipe
from taming_dist.training.optimization import OptimConfig


class PlainEngine:
    """What a recipe needs of an engine, in plain torch; `gradients` are those of the last step."""

    def __init__(
        self,
        module: nn.Module,
        groups: list[dict[str, Any]],
        optimizer: OptimConfig,
        config: EngineConfig,
        world: World,
        micro_batch: int,
        accumulation: int,
        ema_half_life: int = 0,
        skip_spikes: float = 0.0,
    ) -> None:
        assert ema_half_life == 0, "the average is DeepSpeed's engine's own"
        assert skip_spikes == 0, "so are spikes"
        self.module = module
        self.accumulation = accumulation
        self.gradients: dict[str, Tensor] = {}
        self.calls = self.backwards = self.steps = self._micro_batches = 0
        betas = (optimizer.betas[0], optimizer.betas[1])
        self._optimizer = torch.optim.Adam(groups, lr=0.0, betas=betas)
        self.lr = 0.0
        self.moved, self.spiked = torch.tensor(True), torch.tensor(False)

    def __call__(self, *args: Any) -> Any:
        self.calls += 1
        return self.module(*args)

    def backward(self, loss: Tensor, value: Tensor | None = None) -> None:
        self.backwards += 1
        spoilt = not (loss if value is None else value).isfinite()
        (loss * torch.nan if spoilt else loss / self.accumulation).backward()

    def step(self) -> None:
        self._micro_batches += 1
        if self._micro_batches % self.accumulation:
            return
        self.steps += 1
        self.gradients = {
            name: parameter.grad.clone()
            for name, parameter in self.module.named_parameters()
            if parameter.grad is not None
        }
        finite = [gradient.isfinite().all() for gradient in self.gradients.values()]
        self.moved = torch.stack(finite).all()
        if self.moved:
            self._optimizer.step()
        self._optimizer.zero_grad()

    def set_lr(self, lr: float) -> None:
        self.lr = lr
        for group in self._optimizer.param_groups:
            group["lr"] = lr

    def replace_rows(self, parameter: nn.Parameter, rows: Tensor, values: Tensor) -> None:
        parameter.data[rows] = values[rows]

    def gradients_at(self, loss: Tensor, *leaves: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss, leaves, materialize_grads=True))

    def window_metrics(self) -> dict[str, float]:
        return {"lr": self.lr}

    def assign(self, parameter: nn.Parameter, value: Tensor) -> None:
        parameter.data.copy_(value)

    @contextmanager
    def autocast(self) -> Iterator[None]:
        yield

    @contextmanager
    def evaluated(self) -> Iterator[Any]:
        yield self.module.eval()
        self.module.train()

    def root_weights(self) -> AbstractContextManager[None]:
        return nullcontext()

    def save(self, folder: Path, name: str) -> None:
        raise AssertionError("no test of recipes saves")

    def full_state(self) -> dict[str, Tensor]:
        return {name: value.clone() for name, value in self.module.state_dict().items()}


@dataclass
class Images:
    """A batch as far as stage 1 reads it."""

    images: Tensor

    def __len__(self) -> int:
        return len(self.images)

    @property
    def columns(self) -> dict[str, Tensor]:
        return {"image": self.images}


ALONE = World(0, 1, 0, torch.device("cpu"))
MODEL = {
    "resolution": 32,
    "channels": 32,
    "multipliers": [1, 1, 1],
    "blocks": 1,
    "attention_resolutions": [],
    "latent_channels": 16,
}


@pytest.fixture
def batch() -> Callable[..., Images]:
    def make(count: int = 2, seed: int = 0) -> Images:
        randomness = torch.Generator().manual_seed(seed)
        shape = (count, 3, 32, 32)
        return Images(torch.randint(0, 256, shape, generator=randomness, dtype=torch.uint8))

    return make


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch) -> Callable[..., VQGANRecipe]:
    """A small stage 1 on plain engines; keywords change the loss, `model` the model, `l1` to
    `perceptual` the weights of its terms, `net` that of LPIPS."""
    monkeypatch.setattr("taming_dist.stages.context.Engine", PlainEngine)

    def make(
        model: dict[str, Any] | None = None,
        accumulation: int = 1,
        lr: float = 1e-4,
        micro_batch: int = 2,
        l1: float = 1.0,
        l2: float | None = None,
        perceptual: float = 1.0,
        net: str = "alex",
        **loss: Any,
    ) -> VQGANRecipe:
        settings = MODEL | {"quantizer": VectorQuantizerConfig(codes=24, dim=8)} | (model or {})
        lpips = PerceptualConfig(perceptual, net=net, weights="random")
        terms: dict[str, TermConfig] = {"l1": L1Config(l1), "perceptual": lpips}
        if l2 is not None:
            terms["l2"] = L2Config(l2)
        defaults = {
            "terms": terms,
            "disc_start": 0,
            "discriminator": PatchGANConfig(channels=8, layers=2),
        }
        return VQGANRecipe(
            VQGANConfig(**settings),
            VQGANLossConfig(**defaults | loss),
            Context(OptimConfig(lr=lr), EngineConfig(), ALONE, micro_batch, accumulation),
        )

    return make


@pytest.fixture
def code_recipe(monkeypatch: pytest.MonkeyPatch) -> Callable[..., TransformerRecipe]:
    """A small stage 2 for 24 codes and 3 classes on a plain engine; `parts`: what its model has
    beside its sizes; other keywords: those of the recipe beside its model and loss."""
    monkeypatch.setattr("taming_dist.stages.context.Engine", PlainEngine)

    def make(
        accumulation: int = 1,
        lr: float = 1e-3,
        condition_dropout: float = 0.0,
        parts: Mapping[str, Any] | None = None,
        **given: Any,
    ) -> TransformerRecipe:
        model = TransformerConfig(
            vocabulary=24,
            grid=[3, 4],
            layers=1,
            heads=2,
            width=16,
            null_prefix=condition_dropout > 0,
            **{"condition": ClassCondition(3), **(parts or {})},
        )
        loss = TokenLossConfig(condition_dropout=condition_dropout)
        context = Context(OptimConfig(lr=lr), EngineConfig(), ALONE, 2, accumulation)
        return TransformerRecipe(model, loss, context, **given)

    return make


@pytest.fixture
def label_recipe(monkeypatch: pytest.MonkeyPatch) -> Callable[..., LabelMapRecipe]:
    """A small first stage for label maps of 5 classes on a plain engine."""
    monkeypatch.setattr("taming_dist.stages.context.Engine", PlainEngine)

    def make(accumulation: int = 1, lr: float = 1e-4, **loss: Any) -> LabelMapRecipe:
        quantizer = VectorQuantizerConfig(codes=24, dim=8)
        return LabelMapRecipe(
            VQGANConfig(**MODEL, quantizer=quantizer, modality=LabelMap(5)),
            LabelMapLossConfig(**loss),
            Context(OptimConfig(lr=lr), EngineConfig(), ALONE, 2, accumulation),
        )

    return make
