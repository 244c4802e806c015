"""The workload of a first stage: FLOPs of its step, counted on networks without memory.

Each function runs the passes of the step that it counts for. Beside products everything is left
out, and so are the two gradients at the decoder's last convolution from which the adaptive weight
comes, a thousandth of a step.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from taming_dist import pretrained
from taming_dist.engine.flops import Flops
from taming_dist.losses.reconstruction import ReconstructionLoss
from taming_dist.models.discriminators import DinoConfig, build_discriminator
from taming_dist.models.vqgan import VQGAN, VQGANConfig
from taming_dist.stages.autoencoder import NONE, Projections
from taming_dist.stages.vqgan_loss import VQGANLossConfig
from taming_dist.training.workload import Workload

META = torch.device("meta")
# R1: the pass, its gradient at the images, and the gradients of the factors of both
GRADIENT_PENALTY = 6  # passes

Network = Callable[..., Any]


def counted(network: Network, *inputs: Any) -> Flops:
    """The FLOPs of a pass."""
    with Flops() as flops:
        network(*inputs)
    return flops


def blank_image(config: VQGANConfig, size: int) -> Tensor:
    """An image [1,c,h,w] as the network reads it, without memory."""
    return torch.empty(1, config.modality.channels, size, size, device=META)


def generator_flops(
    config: VQGANConfig,
    size: int,
    freeze: Sequence[str] = (),
    projections: Projections = NONE,
) -> Flops:
    """Those of E, codebook and G for an image of `size` pixels across, with the projections
    that losses need; the search of the codes, which has no gradient, is one of its
    products, and so are those of what is frozen."""
    started = {"initial": "random"} if hasattr(config.quantizer, "initial") else {}
    quantizer = dataclasses.replace(config.quantizer, **started)
    with META:
        network = VQGAN(dataclasses.replace(config, quantizer=quantizer))
        network.add_projections(projections)
    network.freeze(freeze)
    return counted(network, blank_image(config, size))


def generator_workload(config: VQGANConfig, size: int, freeze: Sequence[str] = ()) -> Workload:
    """That of a step without networks in its loss."""
    return Workload({"generator": generator_flops(config, size, freeze).total})


def vqgan_workload(
    model: VQGANConfig, loss: VQGANLossConfig, size: int, freeze: Sequence[str] = ()
) -> Workload:
    """That of the step of `stages.vqgan`.

    `generator`: E, codebook and G, both ways. `losses`: the terms' networks, LPIPS say, on image
    and reconstruction, and their gradient at the latter. `gan`: what D says of the reconstruction,
    and the gradient of that. `discriminator`: D's own step on both, frozen features of them
    included. `update`: another reconstruction for it, with loss.order=updated. `r1`: the penalty,
    as far as it is products.
    """
    with META:
        losses = ReconstructionLoss(loss.terms, pretrained.Blank()).to(META)
    generator = generator_flops(model, size, freeze, losses.projections)
    side = size // model.factor
    projected = {
        name: torch.empty(1, width, side, side, device=META, requires_grad=True)
        for name, (_, width) in losses.projections.items()
    }
    x, y = blank_image(model, size), blank_image(model, size).requires_grad_(True)
    parts = {"generator": generator.total, "losses": counted(losses, x, y, projected).total}
    if loss.discriminator is not None:
        parts |= adversary_parts(model, loss, x, y)
        if loss.order == "updated":
            parts["update"] = generator.forward
    return Workload(parts, lambda step: active_parts(loss, step))


def adversary_parts(
    model: VQGANConfig, loss: VQGANLossConfig, x: Tensor, y: Tensor
) -> Mapping[str, int]:
    """Those of the GAN for images x and reconstructions y [1,c,h,w]."""
    assert loss.discriminator is not None
    frozen: nn.Module = nn.Identity()
    with META:
        network = build_discriminator(loss.discriminator, model.modality.channels)
        if isinstance(loss.discriminator, DinoConfig):
            frozen = pretrained.blank_features(loss.discriminator)
    features = counted(frozen, y)  # those of reconstructions; those of images have no gradient
    judged: Tensor = frozen(y)
    learning = counted(network, judged.detach())
    network.requires_grad_(False)
    looking = counted(network, judged)
    found = {
        "gan": features.total + looking.total,
        "discriminator": features.forward + 2 * learning.total,
    }
    if loss.order == "updated":
        found["discriminator"] += features.forward
    if loss.r1_weight > 0:
        found["r1"] = GRADIENT_PENALTY * learning.forward
    return found


def active_parts(loss: VQGANLossConfig, step: int) -> set[str]:
    """What runs in the optimizer step that follows so many."""
    found = {"generator", "losses"}
    if loss.trains_discriminator(step):
        found |= {"discriminator", "update"}
        if loss.gan_weight(step) > 0:
            found.add("gan")
        if loss.r1_weight > 0 and step % loss.r1_every == 0:
            found.add("r1")
    return found
