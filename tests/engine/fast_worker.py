"""One rank of test_fast.py: the same steps of a wide VQGAN with and without `engine.fast`.

Run as `python fast_worker.py OUT` with torchrun's variables; writes OUT-<rank>.json.
"""

from typing import Any
from unittest import mock

import torch
from small_stage import norms_of, work

from taming_dist.engine.partition import build_network
from taming_dist.engine.settings import EngineConfig
from taming_dist.engine.world import World
from taming_dist.engine.zero import Engine
from taming_dist.kernels import group_norm_cpu, winograd
from taming_dist.models.quantizers import VectorQuantizerConfig
from taming_dist.models.vqgan import VQGAN, VQGANConfig
from taming_dist.training.optimization import OptimConfig

CONFIG = VQGANConfig(
    VectorQuantizerConfig(codes=24, dim=8), resolution=24, channels=128, multipliers=[1, 1],
    blocks=1, attention_resolutions=[], latent_channels=16,
)  # fmt: skip
LEARNING_RATE = 1e-4


def steps(world: World, zero: int, fast: bool) -> dict[str, Any]:
    """Losses of three steps, the norms of the weights after them, and how often kernels ran."""
    config = EngineConfig(zero, persist_below=0, fast=fast)
    torch.manual_seed(0)
    network = build_network(lambda: VQGAN(CONFIG), config, world)
    groups = [{"params": list(network.parameters())}]
    engine = Engine(network, groups, OptimConfig(lr=LEARNING_RATE), config, world, 4, 1)
    engine.set_lr(LEARNING_RATE)
    losses = []
    with (
        mock.patch.object(winograd, "convolution", wraps=winograd.convolution) as convolution,
        mock.patch.object(group_norm_cpu, "group_norm", wraps=group_norm_cpu.group_norm) as norm,
        mock.patch.dict(group_norm_cpu.LEAST, {torch.float32: 24 * 24 * 128}),
    ):
        for step in range(3):
            torch.manual_seed(step)
            images = torch.rand(4, 3, 24, 24) * 2 - 1
            out = engine(images)
            loss = (out.images - images).square().mean() + out.codebook_loss
            engine.backward(loss)
            engine.step()
            losses.append(float(loss))
    calls = [convolution.call_count, norm.call_count]
    return {"losses": losses, "norms": norms_of(engine), "calls": calls}


def find(world: World) -> dict[str, Any]:
    return {
        f"{zero} {fast}": steps(world, zero, fast) for zero in (0, 2, 3) for fast in (True, False)
    }


if __name__ == "__main__":
    work(find)
