"""One rank of test_blocks.py: the same steps with plain, recomputed and compiled blocks.

Run as `python blocks_worker.py OUT` with torchrun's variables; writes OUT-<rank>.json. With
BLOCKS=compile in the environment it compiles, which takes a minute.
"""

import os
from collections.abc import Callable
from typing import Any

import torch
from small_stage import norms_of, work

from taming_dist.engine.partition import build_network
from taming_dist.engine.settings import EngineConfig
from taming_dist.engine.world import World
from taming_dist.engine.zero import Engine
from taming_dist.models.autoencoder import ResnetBlock
from taming_dist.models.networks import ViTConfig
from taming_dist.models.prior.transformer import Transformer, TransformerConfig
from taming_dist.models.quantizers import VectorQuantizerConfig
from taming_dist.models.vqgan import VQGAN, FirstStageConfig, VQGANConfig
from taming_dist.training.optimization import OptimConfig

# Biases before a GroupNorm have no gradient but rounding, which Adam blows up to whole steps.
LEARNING_RATE = 1e-4
COMPILES = os.environ.get("BLOCKS") == "compile"
DROPOUT = 0.0 if COMPILES else 0.2  # compiled code draws other random numbers
VQGAN_CONFIG = VQGANConfig(
    VectorQuantizerConfig(codes=24, dim=8),
    resolution=16,
    channels=32,
    multipliers=[1, 1],
    blocks=1,
    attention_resolutions=[8],
    latent_channels=16,
    dropout=DROPOUT,
)
VIT_CONFIG = ViTConfig(
    VectorQuantizerConfig(codes=24, dim=8), 16, patch=4, width=16, depth=2, heads=2, registers=2
)
GPT_CONFIG = TransformerConfig(
    vocabulary=24, grid=[3, 4], layers=2, heads=2, width=16, dropout_residual=DROPOUT
)


def engine_of(make: Callable[[], Any], world: World, **settings: Any) -> Engine:
    engine = EngineConfig(persist_below=0, **settings)
    torch.manual_seed(0)
    network = build_network(make, engine, world)
    groups = [{"params": list(network.parameters())}]
    made = Engine(network, groups, OptimConfig(lr=LEARNING_RATE), engine, world, 1, 1)
    made.set_lr(LEARNING_RATE)
    return made


def vqgan_steps(config: FirstStageConfig, world: World, **settings: Any) -> dict[str, Any]:
    """Losses of three steps, the norms of the weights after them, and forward passes of blocks."""
    engine = engine_of(lambda: VQGAN(config), world, **settings)
    calls, losses = [0], []
    for block in engine.module.modules():
        if isinstance(block, ResnetBlock):
            count_convolutions(block, calls)
    for step in range(3):
        torch.manual_seed(step)
        images = torch.rand(1, 3, 16, 16) * 2 - 1
        out = engine(images)
        loss = (out.images - images).square().mean() + out.codebook_loss
        engine.backward(loss)
        engine.step()
        losses.append(float(loss))
    return {"losses": losses, "norms": norms_of(engine), "calls": calls[0]}


def count_convolutions(block: ResnetBlock, calls: list[int]) -> None:
    def count(*_: Any) -> None:
        calls[0] += 1

    block.conv1.register_forward_hook(count)


def gpt_steps(world: World, **settings: Any) -> dict[str, Any]:
    engine = engine_of(lambda: Transformer(GPT_CONFIG), world, **settings)
    losses = []
    prefix = engine.module.condition.prefix(2, {})
    for step in range(3):
        torch.manual_seed(step)
        tokens = torch.randint(24, (2, 12))
        logits = engine(tokens, prefix)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens.flatten())
        engine.backward(loss)
        engine.step()
        losses.append(float(loss))
    return {"losses": losses, "norms": norms_of(engine)}


def runs(world: World) -> dict[str, Any]:
    found: dict[str, Any] = {}
    variants = {"plain": {}, "recompute": {"recompute": True}}
    if COMPILES:
        variants = {"plain": {}, "compile": {"recompute": True, "compile": True}}
    for zero in (0, 3) if COMPILES else range(4):
        for name, settings in variants.items():
            known = {"zero": zero} | settings
            found[f"zero{zero} {name} vqgan"] = vqgan_steps(VQGAN_CONFIG, world, **known)
            found[f"zero{zero} {name} vit"] = vqgan_steps(VIT_CONFIG, world, **known)
            found[f"zero{zero} {name} gpt"] = gpt_steps(world, zero=zero, **settings)
    return found


if __name__ == "__main__":
    work(runs)
