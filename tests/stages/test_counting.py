"""The workload that is counted without memory is what a step of the recipe runs."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from taming_dist.data.codes import CodeBatch
from taming_dist.models.discriminators import (
    BlurPoolConfig,
    DinoConfig,
    PatchGANConfig,
    StyleGANConfig,
)
from taming_dist.models.networks import MaskGITConfig, ViTConfig
from taming_dist.models.prior import head
from taming_dist.models.prior.blocks import LlamaBlockConfig
from taming_dist.models.prior.conditions import TextCondition
from taming_dist.models.prior.schemes import Masked
from taming_dist.models.quantizers import (
    EMAQuantizerConfig,
    GumbelQuantizerConfig,
    IndexQuantizerConfig,
    LFQuantizerConfig,
)
from taming_dist.stages.counting import generator_workload, vqgan_workload
from taming_dist.stages.prior import prior_workload
from taming_dist.training.clock import Clock
from tests.stages.test_label_maps import blocky
from tests.tiny_models import tiny_networks

Make = Callable[..., Any]


class Run(TorchDispatchMode):
    """Adds up the FLOPs of what kernels are called for, by torch's own formulas."""

    flops = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        return out


def flops_of(step: Iterable[Any], images: int) -> float:
    """FLOPs per image of a step that runs; attention as the products that it consists of."""
    with sdpa_kernel(SDPBackend.MATH), Run() as run:
        list(step)
    return run.flops / images


@pytest.mark.parametrize(
    "loss",
    [
        {},
        {"disc_start": 3},
        {"disc_start": 3, "disc_warmup": 3},
        {"order": "updated"},
        {"discriminator": StyleGANConfig(size=32, channels=8)},
        {"discriminator": PatchGANConfig(channels=8, layers=2, norm="group"), "perceptual": 0.0},
        {"discriminator": DinoConfig(weights="random", depths=[2], norm="group")},
        {
            "model": {
                "attention_resolutions": [32],
                "quantizer": EMAQuantizerConfig(codes=24, dim=8),
            }
        },
        {"model": {"quantizer": EMAQuantizerConfig(codes=24, dim=8, initial="data")}},
        {"model": {"quantizer": GumbelQuantizerConfig(codes=24, dim=8)}},
        {"model": {"quantizer": LFQuantizerConfig(bits=6)}},
        {"model": tiny_networks(MaskGITConfig)},
        {"model": tiny_networks(ViTConfig)},
        {"discriminator": BlurPoolConfig(channels=8, layers=2)},
    ],
)
def test_the_workload_of_a_vqgan_is_that_of_its_step(
    recipe: Make, batch: Make, loss: dict[str, Any]
) -> None:
    made = recipe(adaptive="fixed", **loss)
    ran = flops_of(made.train_step([batch()], Clock(2, 9)), images=2)
    counted = vqgan_workload(made.generator.module.config, made.loss, 32)
    # the norms of the weights of DINO's heads are taken once for both images
    tolerance = 0.05 if isinstance(made.loss.discriminator, DinoConfig) else 1e-6
    assert counted.flops(step=0) == pytest.approx(ran, rel=tolerance)


def test_what_is_computed_again_counts_once(recipe: Make, batch: Make) -> None:
    made = recipe(model={"quantizer": IndexQuantizerConfig(codes=512, dim=8)}, adaptive="fixed")
    ran = flops_of(made.train_step([batch()], Clock(2, 9)), images=2)
    counted = vqgan_workload(made.generator.module.config, made.loss, 32).flops(step=0)
    latents, again = 32 / 4 * 32 / 4, 2 * 512 * 8  # the product of codes with latents
    assert ran - counted == pytest.approx(again * latents, rel=0.05)


def test_the_penalty_of_the_discriminator_counts_where_it_is_due(recipe: Make, batch: Make) -> None:
    made = recipe(adaptive="fixed", r1_weight=1.0, r1_every=2)
    counted = vqgan_workload(made.generator.module.config, made.loss, 32)
    with_penalty = flops_of(made.train_step([batch()], Clock(2, 9)), images=2)
    without = flops_of(made.train_step([batch()], Clock(2, 9, images=2)), images=2)
    assert counted.flops(step=1) == pytest.approx(without, rel=1e-3)
    assert counted.flops(step=0) == pytest.approx(with_penalty, rel=0.02)
    assert counted.parts["r1"] == pytest.approx(with_penalty - without, rel=0.2)


def test_the_workload_of_label_maps_is_that_of_their_step(label_recipe: Make) -> None:
    made = label_recipe()
    ran = flops_of(made.train_step([blocky()], Clock(2, 9)), images=2)
    counted = generator_workload(made.generator.module.config, 32)
    assert counted.flops(step=0) == pytest.approx(ran, rel=1e-3)


@pytest.mark.parametrize(
    "parts",
    [
        {},
        {"block": LlamaBlockConfig()},
        {"scheme": Masked()},
        {"condition": TextCondition(tokens=5, width=6), "condition_table": "own"},
    ],
)
def test_the_workload_of_a_prior_is_that_of_its_step(
    code_recipe: Make, parts: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = code_recipe(parts=parts)
    randomness = torch.Generator().manual_seed(0)
    columns = {
        "codes": torch.randint(24, (2, 3, 4), generator=randomness),
        "cls": torch.randint(3, (2,), generator=randomness),
        "txt": torch.randn(2, 5, 6, generator=randomness),
    }
    batch = CodeBatch(columns, torch.arange(2))
    ran = flops_of(made.train_step([batch], Clock(2, 9)), images=2)
    counted = prior_workload(made.network.config)
    assert counted.flops(step=0) == pytest.approx(ran, rel=1e-3)
    monkeypatch.setattr(head, "LARGE_VOCABULARY", 24)  # logits are computed again
    assert prior_workload(made.network.config) == counted
