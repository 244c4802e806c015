"""The original's VQGAN, its losses and its training step.

Legend: b batch, c channels, h w pixels, d latent channels, i j latent grid, K codes, N vectors.
"""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.original.autoencoder import Decoder, Encoder

BETA = 0.25
EPSILON = 1e-10  # of LPIPS' norms


def nearest(z: Tensor, entries: Tensor) -> Tensor:
    """Codes [N] of vectors [N,d] by the whole matrix of distances [N,K] to the entries [K,d]."""
    squares = torch.sum(z**2, dim=1, keepdim=True) + torch.sum(entries**2, dim=1)
    distances = squares - 2 * torch.einsum("bd,dn->bn", z, entries.t())
    return torch.argmin(distances, dim=1)


class Quantizer(nn.Module):
    """The quantizer that its configurations use, with beta on the codebook's term (its default)."""

    def __init__(self, codes: int, dim: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(codes, dim)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Latents [b,d,i,j] -> entries with the latents' gradient, loss, codes [N]."""
        z = z.permute(0, 2, 3, 1).contiguous()
        codes = nearest(z.view(-1, z.shape[-1]), self.embedding.weight)
        z_q = self.embedding(codes).view(z.shape)
        loss = torch.mean((z_q.detach() - z) ** 2) + BETA * torch.mean((z_q - z.detach()) ** 2)
        z_q = z + (z_q - z).detach()
        return z_q.permute(0, 3, 1, 2).contiguous(), loss, codes


class VQGAN(nn.Module):
    """Encoder, quantizer and decoder with the weights of one of ours that has a `vector`
    quantizer; nothing is shared with it."""

    def __init__(self, ours: Any) -> None:
        super().__init__()
        config = ours.config
        quantizer = config.quantizer
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.quantize = Quantizer(quantizer.codes, quantizer.dim)
        self.quant_conv = nn.Conv2d(config.latent_channels, quantizer.dim, 1)
        self.post_quant_conv = nn.Conv2d(quantizer.dim, config.latent_channels, 1)
        take_weights(self, ours)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Images [b,c,h,w] -> reconstructions, codebook loss."""
        z_q, loss, _ = self.quantize(self.quant_conv(self.encoder(images)))
        return self.decoder(self.post_quant_conv(z_q)), loss

    def encode(self, images: Tensor) -> Tensor:
        """Images [b,c,h,w] -> codes [b,i,j]; everything that `forward` computes up to there."""
        latents = self.quant_conv(self.encoder(images))
        _, _, codes = self.quantize(latents)
        return codes.view(len(images), *latents.shape[2:])

    def decode_codes(self, codes: Tensor) -> Tensor:
        """Codes [b,i,j] -> images [b,c,h,w]."""
        entries = self.quantize.embedding(codes.flatten()).view(*codes.shape, -1)
        return self.decoder(self.post_quant_conv(entries.permute(0, 3, 1, 2).contiguous()))


def take_weights(module: nn.Module, ours: nn.Module) -> None:
    """Copy weights by their names; all of `module` must be there."""
    there = ours.state_dict()
    module.load_state_dict({name: there[name] for name in module.state_dict()})
    module.to(next(ours.parameters()).device)


def patchgan(ours: Any, channels: int = 64, layers: int = 3, image_channels: int = 3) -> nn.Module:
    """The discriminator with BatchNorm, and the weights of ours."""
    parts: list[nn.Module] = [nn.Conv2d(image_channels, channels, 4, 2, 1), nn.LeakyReLU(0.2, True)]
    width = channels
    for index in range(1, layers + 1):
        out = channels * min(2**index, 8)
        parts.append(nn.Conv2d(width, out, 4, 2 if index < layers else 1, 1, bias=False))
        parts += [nn.BatchNorm2d(out), nn.LeakyReLU(0.2, True)]
        width = out
    parts.append(nn.Conv2d(width, 1, 4, 1, 1))
    network = nn.Sequential(*parts)
    take_weights(network, ours.main)
    return network


class LPIPS(nn.Module):
    """Both images go through the network in every call; layers and weights are copies of ours."""

    shift: Tensor
    scale: Tensor

    def __init__(self, ours: Any) -> None:
        super().__init__()
        self.slices, self.heads = copy.deepcopy(ours.slices), copy.deepcopy(ours.heads)
        self.register_buffer("shift", ours.shift.clone())
        self.register_buffer("scale", ours.scale.clone())

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Distances [b,1,1,1] of images in [-1,1]."""
        total = torch.zeros((), device=x.device)
        pairs = zip(self._features(x), self._features(y), self.heads, strict=True)
        for one, other, head in pairs:
            difference = (unit_length(one) - unit_length(other)) ** 2
            total = total + F.conv2d(difference, head).mean([2, 3], keepdim=True)
        return total

    def _features(self, images: Tensor) -> list[Tensor]:
        hidden, found = (images - self.shift) / self.scale, []
        for part in self.slices:
            hidden = part(hidden)
            found.append(hidden)
        return found


def unit_length(features: Tensor) -> Tensor:
    length = torch.sqrt(torch.sum(features**2, dim=1, keepdim=True))
    return features / (length + EPSILON)


class Stage1:
    """The training step with the GAN on: two passes, one for each optimizer.

    The generator's: the adaptive weight by two walks from the losses to the last layer, then a walk
    of their sum. The discriminator's: the reconstruction anew, by the weights that have just moved,
    and the reconstruction loss, which is not used. In each the other network's parameters collect
    no gradient.
    """

    def __init__(
        self, vqgan: VQGAN, discriminator: nn.Module, lpips: LPIPS, lr: float, weight: float = 0.8
    ) -> None:
        self.vqgan, self.discriminator, self.lpips, self.weight = (
            vqgan,
            discriminator,
            lpips,
            weight,
        )
        self.optimizers = [
            torch.optim.Adam(network.parameters(), lr=lr, betas=(0.5, 0.9))
            for network in (vqgan, discriminator)
        ]

    def step(self, images: Tensor) -> dict[str, Tensor]:
        """Train on images [b,3,h,w] in [-1,1]; gives the losses and the adaptive weight."""
        moves_g, moves_d = self.optimizers
        self._toggle(generator=True)
        y, codebook = self.vqgan(images)
        rec = self._reconstruction(images, y)
        gan = -torch.mean(self.discriminator(y.contiguous()))
        last = self.vqgan.decoder.conv_out.weight
        (towards,) = torch.autograd.grad(rec, last, retain_graph=True)
        (against,) = torch.autograd.grad(gan, last, retain_graph=True)
        adaptive = torch.norm(towards) / (torch.norm(against) + 1e-4)
        adaptive = torch.clamp(adaptive, 0.0, 1e4).detach()
        loss = rec + self.weight * adaptive * gan + codebook
        moves_g.zero_grad()
        loss.backward()
        moves_g.step()

        self._toggle(generator=False)
        y, _ = self.vqgan(images)
        self._reconstruction(images, y)
        real = self.discriminator(images.contiguous().detach())
        fake = self.discriminator(y.contiguous().detach())
        judged = 0.5 * (torch.mean(F.relu(1.0 - real)) + torch.mean(F.relu(1.0 + fake)))
        moves_d.zero_grad()
        judged.backward()
        moves_d.step()
        found = {"loss": loss, "rec": rec, "codebook": codebook, "gan_g": gan, "gan_d": judged}
        return {name: value.detach() for name, value in found.items()} | {
            "adaptive_weight": adaptive
        }

    def _reconstruction(self, images: Tensor, y: Tensor) -> Tensor:
        distance = torch.abs(images.contiguous() - y.contiguous())
        return torch.mean(distance + self.lpips(images.contiguous(), y.contiguous()))

    def _toggle(self, generator: bool) -> None:
        self.vqgan.requires_grad_(generator)
        self.discriminator.requires_grad_(not generator)
