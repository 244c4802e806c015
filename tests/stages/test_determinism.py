"""Under engine.deterministic no operation of a training step or a preview raises on a GPU.

The CPU refuses few operations. So the steps run here, and what they run is compared with the list
in torch's documentation of `use_deterministic_algorithms`.
"""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from taming_dist.data.codes import CodeBatch
from taming_dist.engine.determinism import use_deterministic
from taming_dist.models.discriminators import BlurPoolConfig, DinoConfig, StyleGANConfig
from taming_dist.models.networks import MaskGITConfig, ViTConfig
from taming_dist.models.quantizers import (
    BSQuantizerConfig,
    EMAQuantizerConfig,
    FSQuantizerConfig,
    GumbelQuantizerConfig,
    IndexQuantizerConfig,
    LFQuantizerConfig,
    VectorQuantizerConfig,
)
from taming_dist.models.vqgan import VQGAN, VQGANConfig
from taming_dist.training.clock import Clock
from tests.tiny_models import tiny_networks

# Each raises on a GPU: backward passes that add up in any order, and a few more.
REFUSED = {
    "avg_pool3d_backward",
    "_adaptive_avg_pool2d_backward",
    "adaptive_max_pool2d_backward",
    "fractional_max_pool2d_backward",
    "max_unpool2d",
    "upsample_linear1d_backward",
    "upsample_bilinear2d_backward",
    "upsample_bicubic2d_backward",
    "_upsample_bilinear2d_aa_backward",
    "_upsample_bicubic2d_aa_backward",
    "reflection_pad1d_backward",
    "reflection_pad2d_backward",
    "nll_loss2d_forward",
    "_ctc_loss_backward",
    "_embedding_bag",
    "put_",
    "histc",
    "median",
    "kthvalue",
    "grid_sampler_2d_backward",
    "cumsum",  # of floating point numbers
    "scatter_reduce",
}


class Watch(TorchDispatchMode):
    """Collects the names of what runs."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        found = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name != "cumsum" or found.is_floating_point():
            self.names.add(name)
        return found


@pytest.fixture(autouse=True)
def deterministic() -> Iterator[None]:
    use_deterministic(True)
    yield
    use_deterministic(False)


def run(recipe: Any, batch: Any) -> set[str]:
    """What a step and a preview run."""
    with Watch() as watch:
        for _ in recipe.train_step([batch], Clock(len(batch), 10)):
            pass
        recipe.preview(batch)
    return watch.names


QUANTIZERS = [
    VectorQuantizerConfig(codes=24, dim=8, revive_below=0.9, initial="kmeans"),
    EMAQuantizerConfig(codes=24, dim=8, revive_below=0.9),
    GumbelQuantizerConfig(codes=24, dim=8),
    FSQuantizerConfig(levels=[3, 3]),
    LFQuantizerConfig(bits=4),
    BSQuantizerConfig(bits=4),
    IndexQuantizerConfig(codes=24, dim=8),
]
LOSSES: dict[str, dict[str, Any]] = {
    "patchgan": {"augment": ["color", "translation", "cutout"], "lecam_weight": 1.0},
    "vgg": {"net": "vgg"},
    "stylegan": {
        "discriminator": StyleGANConfig(size=32, channels=8, max_channels=8),
        "r1_weight": 1.0,
        "r1_every": 1,
    },
    "dino": {"discriminator": DinoConfig(weights="random", depths=[0])},
    "blurpool": {"discriminator": BlurPoolConfig(channels=8, layers=1)},
}


@pytest.mark.parametrize("quantizer", QUANTIZERS, ids=lambda config: config.name)
def test_a_gpu_refuses_no_operation_of_any_quantizer(
    recipe: Callable[..., Any], batch: Callable[..., Any], quantizer: Any
) -> None:
    names = run(recipe(model={"quantizer": quantizer}, discriminator=None), batch())
    assert "convolution_backward" in names
    assert not names & REFUSED


@pytest.mark.parametrize("kind", [MaskGITConfig, ViTConfig])
def test_a_gpu_refuses_no_operation_of_any_networks(
    recipe: Callable[..., Any], batch: Callable[..., Any], kind: Any
) -> None:
    assert not run(recipe(model=tiny_networks(kind), discriminator=None), batch()) & REFUSED


@pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES)
def test_a_gpu_refuses_no_operation_of_any_loss(
    recipe: Callable[..., Any], batch: Callable[..., Any], loss: dict[str, Any]
) -> None:
    assert not run(recipe(**loss), batch()) & REFUSED


def test_a_gpu_refuses_no_operation_of_stage_2(code_recipe: Callable[..., Any]) -> None:
    shape: dict[str, Any] = {"resolution": 32, "channels": 32, "multipliers": [1, 1], "blocks": 1}
    vqgan = VQGAN(VQGANConfig(VectorQuantizerConfig(codes=24, dim=8), **shape))
    batch = CodeBatch(
        {"codes": torch.randint(24, (2, 3, 4)), "cls": torch.tensor([0, 2])}, torch.arange(2)
    )
    recipe = code_recipe(vqgan=vqgan)
    recipe.network.scheme.pkeep = 0.5
    names = run(recipe, batch)
    assert {"embedding_dense_backward", "searchsorted"} <= names
    assert not names & REFUSED


def test_a_refused_operation_would_be_noticed() -> None:
    with Watch() as watch:
        image = torch.zeros(1, 1, 4, 4, requires_grad=True)
        torch.nn.functional.interpolate(image, (2, 2), mode="bicubic").sum().backward()
        torch.ones(3).cumsum(0)
    assert watch.names & REFUSED == {"upsample_bicubic2d_backward", "cumsum"}
