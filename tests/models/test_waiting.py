"""Nothing that networks run in every step of training has the host wait for the device: no value is
asked of it, and none is copied to it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from taming_dist.models.discriminators import PatchGANConfig, StyleGANConfig, build_discriminator
from taming_dist.models.prior import head
from taming_dist.models.prior.blocks import GPTBlockConfig, LlamaBlockConfig, RARBlockConfig
from taming_dist.models.prior.conditions import ClassCondition
from taming_dist.models.prior.prefix import Prefix
from taming_dist.models.prior.transformer import Transformer, TransformerConfig
from taming_dist.models.quantizers import build_quantizer
from taming_dist.models.vqgan import VQGAN, VQGANConfig
from tests.engine.waiting import Waiting
from tests.models.quantizers.test_contract import CONFIGS, latents

PRIOR = {"layers": 1, "heads": 2, "width": 8, "condition": ClassCondition(3), "null_prefix": True}
BLOCKS = [GPTBlockConfig(1), LlamaBlockConfig(), LlamaBlockConfig(adaptive=True), RARBlockConfig()]
SIZES: dict[str, Any] = {"channels": 32, "multipliers": [1, 1], "blocks": 1, "resolution": 8}
DISCRIMINATORS = {
    "patchgan": PatchGANConfig(channels=8, layers=2),
    "actnorm": PatchGANConfig(channels=8, layers=2, norm="actnorm"),
    "stylegan": StyleGANConfig(size=16, channels=8, max_channels=8),
}


def train_twice(network: nn.Module, *inputs: Any) -> None:
    """Two passes; what is made once may be made in the first."""
    network(*inputs)
    with Waiting() as waiting:
        network(*inputs)
    assert waiting.found == []


@pytest.mark.parametrize("kind", CONFIGS)
def test_quantizers_do_not_wait(kind: str) -> None:
    quantizer = build_quantizer(CONFIGS[kind])
    if hasattr(quantizer, "start"):
        quantizer.start._done = True  # asked of the device until it is
    train_twice(quantizer, latents(CONFIGS[kind]))


@pytest.mark.parametrize("kind", DISCRIMINATORS)
def test_discriminators_do_not_wait(kind: str) -> None:
    train_twice(build_discriminator(DISCRIMINATORS[kind], 3), torch.randn(2, 3, 16, 16))


def test_the_vqgan_does_not_wait() -> None:
    vqgan = VQGAN(VQGANConfig(CONFIGS["vector"], **SIZES, latent_channels=4))
    train_twice(vqgan, torch.randn(2, 3, 8, 8))


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.name)
def test_priors_do_not_wait(monkeypatch: pytest.MonkeyPatch, block: Any) -> None:
    """Nor does their loss, where it keeps no logits."""
    monkeypatch.setattr(head, "LARGE_VOCABULARY", 12)
    tokens = torch.zeros(2, 6, dtype=torch.int64)
    dropped = torch.tensor([True, False])
    prefix = Prefix((torch.zeros(2, 1, dtype=torch.int64),), dropped)
    prior = Transformer(TransformerConfig(12, [2, 3], **PRIOR, block=block))
    train_twice(prior, tokens, prefix, prior.places, tokens)


WAITS: dict[str, Callable[[torch.Tensor], Any]] = {
    "_local_scalar_dense": lambda x: float(x.sum()),
    "nonzero": torch.nonzero,
    "lift_fresh": lambda x: torch.tensor([1.0]),
    "index": lambda x: x[x > 0],
    "index_put_": lambda x: x.__setitem__(x > 0, torch.ones(2)),
    "tolist": lambda x: x.tolist(),
}


@pytest.mark.parametrize("name", WAITS)
def test_waiting_is_noticed(name: str) -> None:
    with Waiting() as waiting:
        WAITS[name](torch.tensor([1.0, 0.0, 2.0]) if name != "lift_fresh" else torch.empty(1))
    assert f"{name} at test_waiting.py" in " ".join(waiting.found)
