"""Nothing that networks run in every step of training has the host wait for the device: no value is
asked of it, and none is copied to it."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from taming_dist.models.discriminators import PatchGANConfig, StyleGANConfig, build_discriminator
from taming_dist.models.prior.conditions import ClassCondition
from taming_dist.models.prior.transformer import Transformer, TransformerConfig
from taming_dist.models.quantizers import build_quantizer
from taming_dist.models.vqgan import VQGAN, VQGANConfig
from tests.models.quantizers.test_contract import CONFIGS, latents

WAITING = {"_local_scalar_dense", "bincount", "equal", "lift_fresh", "masked_select", "nonzero"}
GPT = TransformerConfig(12, [2, 3], layers=1, heads=2, width=8, condition=ClassCondition(3))
SIZES: dict[str, Any] = {"channels": 32, "multipliers": [1, 1], "blocks": 1, "resolution": 8}
DISCRIMINATORS = {
    "patchgan": PatchGANConfig(channels=8, layers=2),
    "actnorm": PatchGANConfig(channels=8, layers=2, norm="actnorm"),
    "stylegan": StyleGANConfig(size=16, channels=8, max_channels=8),
}


class NoWaiting(TorchDispatchMode):
    """Refuses the operations for which a GPU keeps the host waiting."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        assert name not in WAITING, name
        return func(*args, **(kwargs or {}))


def train_twice(network: nn.Module, *inputs: torch.Tensor) -> None:
    """Two passes; what is made once may be made in the first."""
    for number in range(2):
        with NoWaiting() if number else torch.enable_grad():
            network(*inputs)


@pytest.mark.parametrize("kind", CONFIGS)
def test_quantizers_do_not_wait(kind: str) -> None:
    quantizer = build_quantizer(CONFIGS[kind])
    if hasattr(quantizer, "start"):
        quantizer.start._done = True  # asked of the device until it is
    train_twice(quantizer, latents(CONFIGS[kind].dim))


@pytest.mark.parametrize("kind", DISCRIMINATORS)
def test_discriminators_do_not_wait(kind: str) -> None:
    train_twice(build_discriminator(DISCRIMINATORS[kind], 3), torch.randn(2, 3, 16, 16))


def test_the_models_do_not_wait() -> None:
    vqgan = VQGAN(VQGANConfig(CONFIGS["vector"], **SIZES, latent_channels=4))
    train_twice(vqgan, torch.randn(2, 3, 8, 8))
    tokens, prefix = torch.zeros(2, 6, dtype=torch.int64), torch.zeros(2, 1, dtype=torch.int64)
    train_twice(Transformer(GPT), tokens, prefix)


def test_waiting_is_noticed() -> None:
    for wait in (lambda x: float(x.sum()), torch.nonzero, lambda x: torch.tensor([1.0])):
        with pytest.raises(AssertionError), NoWaiting():
            wait(torch.ones(3))
