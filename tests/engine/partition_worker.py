"""One rank of test_partition.py: networks at every ZeRO stage, and what a rank holds of them.

Run as `python partition_worker.py OUT` with torchrun's variables; writes OUT-<rank>.json.
"""

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import deepspeed
import torch
from small_stage import digest, small_recipe, work
from torch import nn
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_parameter_registration_hook,
)

from taming_dist.data.codes import CodeBatch
from taming_dist.engine import settings
from taming_dist.engine.settings import EngineConfig
from taming_dist.engine.world import World
from taming_dist.engine.zero import Engine
from taming_dist.models.discriminators import PatchGANConfig
from taming_dist.models.prior.conditions import ClassCondition
from taming_dist.models.prior.transformer import Transformer, TransformerConfig
from taming_dist.models.quantizers import VectorQuantizerConfig
from taming_dist.models.vqgan import VQGAN, VQGANConfig
from taming_dist.stages.context import Context
from taming_dist.stages.prior import TokenLossConfig, TransformerRecipe
from taming_dist.training.clock import Clock
from taming_dist.training.optimization import OptimConfig

GPT = {"vocabulary": 24, "grid": [2, 3], "condition": ClassCondition(3), "layers": 8}
SIZES = {"channels": 32, "multipliers": [1, 1], "blocks": 1, "attention_resolutions": []}
BUCKET = 2_000  # elements; smaller than the layers below


CLASSES = torch.tensor([0, 2])
SHOWN = CodeBatch(  # to all ranks
    {"codes": torch.zeros(2, 2, 3, dtype=torch.int64), "cls": CLASSES}, torch.arange(2)
)


def context_of(world: World, zero: int) -> Context:
    optim = OptimConfig(lr=1e-3, ema_half_life=8)
    return Context(optim, EngineConfig(zero=zero, persist_below=0), world, 2 // world.world_size)


def decoder() -> VQGAN:
    quantizer = VectorQuantizerConfig(codes=24, dim=4)
    torch.manual_seed(4)
    return VQGAN(VQGANConfig(quantizer, resolution=8, latent_channels=4, **SIZES)).eval()


def transformer(
    world: World, zero: int, width: int, vqgan: VQGAN | None = None, initial: Any = None
) -> TransformerRecipe:
    model = TransformerConfig(**GPT, heads=2, width=width, null_prefix=True)
    return TransformerRecipe(
        model,
        TokenLossConfig(condition_dropout=0.5),
        context_of(world, zero),
        vqgan,
        initial,
        preview_guidance=2.0,
    )


def codes(world: World) -> CodeBatch:
    """This rank's share of a global batch of 2."""
    randomness = torch.Generator().manual_seed(0)
    drawn = torch.randint(24, (2, 2, 3), generator=randomness)
    mine = slice(world.rank, None, world.world_size)
    return CodeBatch({"codes": drawn[mine], "cls": CLASSES[mine]}, torch.arange(2)[mine])


def first_weights(world: World, zero: int) -> dict[str, Any]:
    """sha256 of what networks start with, whole: drawn, or given."""
    loss: dict[str, Any] = {"discriminator": PatchGANConfig(channels=8, layers=2, norm="batch")}
    stage_1 = small_recipe(VectorQuantizerConfig(codes=24, dim=8), context_of(world, zero), **loss)
    stage_2 = transformer(world, zero, 16)
    given = {
        name: w + 1
        for name, w in Transformer(stage_2.transformer.module.config).state_dict().items()
    }
    started = transformer(world, zero, 16, initial=given)
    engines = {**stage_1.engines, **stage_2.engines, "started": started.transformer}
    found: dict[str, Any] = {name: state_digest(engine) for name, engine in engines.items()}
    return found | {"given": digest([given[name] for name in sorted(given)])}


def state_digest(engine: Engine) -> str | None:
    state = engine.full_state()
    return None if state is None else digest([state[name] for name in sorted(state)])


def train_step(recipe: TransformerRecipe, batch: CodeBatch, step: int) -> None:
    list(recipe.train_step([batch], Clock(2, 4, images=2 * step)))


def looks(world: World, zero: int) -> dict[str, Any]:
    """What validation and previews give after two steps."""
    recipe, batch = transformer(world, zero, 16, decoder()), codes(world)
    for step in range(2):
        train_step(recipe, batch, step)
    found: dict[str, Any] = recipe.validate([(batch, True)])
    shown = recipe.preview(SHOWN)
    return found | {"picture": None if shown is None else shown.picture.flatten().tolist()}


class Held:
    """The most elements of parameters that this rank had in its memory at a time: looked at when a
    parameter is made or gathered, and while each module runs."""

    def __init__(self) -> None:
        self.most = 0
        self._followed: list[weakref.ref[Any]] = []

    def look(self) -> None:
        alive = [p for ref in self._followed if (p := ref()) is not None and not p.is_meta]
        shares = [p.ds_tensor for p in alive if getattr(p, "ds_tensor", None) is not None]
        self.most = max(self.most, sum(part.numel() for part in [*alive, *shares]))

    def follow(self, module: nn.Module, name: str, parameter: Any) -> None:
        if parameter is not None and all(ref() is not parameter for ref in self._followed):
            self._followed.append(weakref.ref(parameter))
            self.look()

    def of(self, act: Callable[[], Any]) -> int:
        """The most while something is done."""
        self.most = 0
        act()
        self.look()
        return self.most


def held(world: World, zero: int) -> dict[str, int]:
    """Elements of parameters, at most, in the life of a network; and how many it has."""
    vqgan, batch, made, counter = decoder(), codes(world), [], Held()
    hooks = [
        register_module_parameter_registration_hook(counter.follow),
        register_module_forward_hook(lambda *_: counter.look()),
    ]
    enter = deepspeed.zero.GatheredParameters.__enter__

    def entered(gathering: Any) -> None:
        enter(gathering)
        counter.look()

    deepspeed.zero.GatheredParameters.__enter__ = entered
    found = {"building": counter.of(lambda: made.append(transformer(world, zero, 64, vqgan)))}
    recipe: TransformerRecipe = made[0]
    for step in range(3):  # the first ones are those in which DeepSpeed learns the order
        found["training"] = counter.of(partial(train_step, recipe, batch, step))
    found["validation"] = counter.of(lambda: recipe.validate([(batch, True)]))
    found["preview"] = counter.of(lambda: recipe.preview(SHOWN))
    found["export"] = counter.of(recipe.transformer.full_state)
    deepspeed.zero.GatheredParameters.__enter__ = enter
    for hook in hooks:
        hook.remove()
    parameters = recipe.transformer.module.parameters()
    return found | {"all": sum(getattr(p, "ds_numel", p.numel()) for p in parameters)}


def runs(world: World) -> dict[str, Any]:
    settings.BUCKET = BUCKET
    found: dict[str, Any] = {}
    for zero in range(4):
        found[f"zero{zero} first"] = first_weights(world, zero)
        found[f"zero{zero} looks"] = looks(world, zero)
        if world.world_size > 1 and zero in (0, 3):
            found[f"zero{zero} held"] = held(world, zero)
    return found


if __name__ == "__main__":
    work(runs)
