"""Floating-point operations that the mathematics takes, counted operation by operation.

The plain networks run on tensors without memory under torch's counter: convolutions and products of
matrices count, two operations for a multiplication and an addition, attention in full also where it
is causal; norms, activations and the optimizer do not. What a form computes twice or throws away is
not counted: the same number for all forms.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from taming_dist import pretrained
from taming_dist.models.autoencoder import last_layer_gradients
from taming_dist.models.discriminators import build_discriminator
from taming_dist.models.prior.prefix import Prefix
from taming_dist.models.prior.transformer import Transformer, TransformerConfig
from taming_dist.models.vqgan import VQGAN, VQGANConfig
from taming_dist.stages.vqgan_loss import VQGANLossConfig


def counted(work: Callable[[], Any]) -> float:
    """FLOP of what `work` builds and returns as a function without arguments."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        call = work()
        # composed of products, which the counter knows on every device
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            call()
    return float(counter.get_total_flops())


def encoding(config: VQGANConfig, batch: int, size: int) -> float:
    """From images to codes."""

    def build() -> Callable[[], Any]:
        model, images = VQGAN(config), images_of(config, batch, size)
        return lambda: model.encode(images)

    return counted(build)


def decoding(config: VQGANConfig, batch: int, size: int) -> float:
    """From codes to images."""

    def build() -> Callable[[], Any]:
        model, side = VQGAN(config), size // config.factor
        codes = torch.zeros(batch, side, side, dtype=torch.int64)
        return torch.no_grad()(lambda: model.decode_codes(codes))

    return counted(build)


def vqgan_step(config: VQGANConfig, loss: VQGANLossConfig, batch: int, size: int) -> float:
    """A step of both networks with the GAN on: one walk through G and E, LPIPS' gradient at the
    reconstruction only, D's gradient at it and then at its weights."""
    lpips = pretrained.Blank().lpips_network("vgg", "random")  # reads files

    def build() -> Callable[[], Any]:
        assert loss.discriminator is not None
        generator = VQGAN(config)
        judge = build_discriminator(loss.discriminator, config.modality.channels)
        x = images_of(config, batch, size)

        def step() -> None:
            out = generator(x)
            y = out.images.detach().requires_grad_(True)
            lpips(x, y, lpips.features(x)).mean().backward()
            judge.requires_grad_(False)
            judge(y).mean().backward()
            assert y.grad is not None
            last_layer_gradients(out.features, [y.grad, y.grad])
            ((out.images * y.grad).sum() + out.codebook_loss).backward()
            judge.requires_grad_(True)
            (judge(x) - judge(y.detach())).mean().backward()

        return step

    return counted(build)


def prior_step(config: TransformerConfig, batch: int) -> float:
    """A training step of the transformer."""

    def build() -> Callable[[], Any]:
        model = Transformer(config)
        tokens = torch.zeros(batch, config.num_tokens, dtype=torch.int64)
        prefix = Prefix((torch.zeros(batch, config.condition.length, dtype=torch.int64),))
        return lambda: model(tokens, prefix, None, tokens).mean().backward()

    return counted(build)


def searching(vectors: int, codes: int, dim: int) -> float:
    """The product that gives the distances of vectors to codes."""
    return 2.0 * vectors * codes * dim


def images_of(config: VQGANConfig, batch: int, size: int) -> Tensor:
    return torch.zeros(batch, config.modality.channels, size, size)
