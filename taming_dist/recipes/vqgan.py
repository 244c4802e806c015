"""Stage 1: the VQGAN. Source: arXiv 2012.09841, section 3.1, equations 4 to 7.

One step walks through every network once. The generator's graph is cut at the reconstruction x^:
each loss gives its gradient at x^, the adaptive weight comes from those two gradients and the
decoder's last convolution alone, and one backward pass takes their sum through G and E.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from taming_dist.engine.settings import EngineConfig
from taming_dist.engine.world import World
from taming_dist.engine.zero import Engine
from taming_dist.errors import UserError
from taming_dist.evaluation.reconstruction import ReconstructionFigures
from taming_dist.losses.adversarial import adaptive_weight, hinge_discriminator, hinge_generator
from taming_dist.losses.perceptual import LPIPS
from taming_dist.losses.reconstruction import l1
from taming_dist.models.autoencoder import last_layer_gradient
from taming_dist.models.discriminators import (
    PatchGAN,
    PatchGANConfig,
    accuracy,
    average_statistics,
    track_statistics,
)
from taming_dist.models.quantizers import Statistics
from taming_dist.models.vqgan import VQGAN, Reconstruction, VQGANConfig
from taming_dist.pretrained import lpips_network
from taming_dist.training.clock import Clock
from taming_dist.training.export import write_export
from taming_dist.training.metrics import CodeUsage
from taming_dist.training.optimization import OptimConfig, mix, seed_step
from taming_dist.training.recipe import Scalars


@dataclasses.dataclass
class VQGANLossConfig:
    """Weights of the terms; the GAN counts from optimizer step `disc_start` on.

    `lpips_weights`: pretrained, or random (tests only); `adaptive`: `global` averages the two
    gradients over ranks, so that the weight does not depend on their number; `per_rank` takes each
    rank's own, as the original does.
    """

    perceptual_weight: float = 1.0
    lpips_net: str = "vgg"
    lpips_weights: str = "pretrained"
    codebook_weight: float = 1.0
    disc_start: int = 250_001
    disc_weight: float = 0.8
    adaptive: str = "global"
    discriminator: PatchGANConfig = dataclasses.field(default_factory=PatchGANConfig)

    def __post_init__(self) -> None:
        if self.adaptive not in ("global", "per_rank"):
            raise UserError(f"loss.adaptive={self.adaptive}: use global or per_rank")


class VQGANRecipe:
    """Trains E, codebook and G against a PatchGAN D."""

    def __init__(
        self,
        model: VQGANConfig,
        loss: VQGANLossConfig,
        optim: OptimConfig,
        engine: EngineConfig,
        world: World,
        micro_batch: int,
        accumulation: int,
        seed: int,
    ) -> None:
        self.loss, self.optim, self.world, self.seed = loss, optim, world, seed
        self.lpips: LPIPS = lpips_network(loss.lpips_net, loss.lpips_weights).to(world.device)
        torch.manual_seed(seed)  # the same initial weights everywhere
        vqgan = VQGAN(model)
        discriminator = PatchGAN(loss.discriminator, model.image_channels)
        average = world.average()
        if average is not None:
            average_statistics(discriminator, average)
        cut = (optim, engine, world, micro_batch, accumulation)
        self.generator = Engine(vqgan, [{"params": list(vqgan.parameters())}], *cut)
        self.discriminator = Engine(
            discriminator, [{"params": list(discriminator.parameters())}], *cut
        )
        self.usage = CodeUsage(model.vocabulary, world.device)
        self.revived = 0

    @property
    def engines(self) -> Mapping[str, Engine]:
        return {"generator": self.generator, "discriminator": self.discriminator}

    def train_step(self, micro_batches: Iterable[Any], clock: Clock) -> Iterator[Scalars]:
        """One optimizer step of G and, once the GAN counts, of D; yields the terms of each part."""
        seed_step(self.seed, clock, self.world.rank)
        for engine in self.engines.values():
            engine.set_lr(self.optim.learning_rate(clock))
        statistics = []
        for batch in micro_batches:
            images = self._images(batch)
            out: Reconstruction = self.generator(images)
            reconstruction = out.images.detach().float().requires_grad_(True)

            rec, scalars = self._reconstruction_loss(images, reconstruction)
            (gradient,) = torch.autograd.grad(rec, reconstruction)
            if clock.step >= self.loss.disc_start:
                gan = self._generator_gan_loss(reconstruction)
                (gan_gradient,) = torch.autograd.grad(gan, reconstruction)
                weight = self._adaptive_weight(out.features, gradient, gan_gradient)
                gradient = gradient + self.loss.disc_weight * weight * gan_gradient
                scalars |= {"gan_g": gan, "adaptive_weight": weight}

            # its gradient at x^ is the sum above; its value means nothing
            surrogate = (out.images.float() * gradient).sum()
            self.generator.backward(surrogate + self.loss.codebook_weight * out.codebook_loss)
            self.generator.step()
            if clock.step >= self.loss.disc_start:
                scalars |= self._discriminator_step(images, out.images.detach())

            statistics.append(out.statistics)
            yield scalars | self._total(scalars, out.codebook_loss)
        self._update_codebook(statistics, clock)

    def _reconstruction_loss(self, x: Tensor, y: Tensor) -> tuple[Tensor, Scalars]:
        """|x - x^| + LPIPS(x, x^)."""
        pixels, perceptual = l1(x, y), self.lpips(x, y, self.lpips.features(x)).mean()
        total = pixels + self.loss.perceptual_weight * perceptual
        return total, {"rec": pixels, "perceptual": perceptual}

    def _generator_gan_loss(self, y: Tensor) -> Tensor:
        """-D(x^); D only looks: it collects no gradient and its running statistics stand still."""
        network = self.discriminator.module
        track_statistics(network, False)
        with self.discriminator.autocast():
            logits = network(y)
        track_statistics(network, True)
        return hinge_generator(logits)

    def _adaptive_weight(self, features: Tensor, rec: Tensor, gan: Tensor) -> Tensor:
        """Equation 7, from gradients at x^."""
        at_last_layer = torch.stack([last_layer_gradient(features, g) for g in (rec, gan)])
        if self.loss.adaptive == "global":
            self.world.mean(at_last_layer)
        return adaptive_weight(at_last_layer[0], at_last_layer[1])

    def _discriminator_step(self, x: Tensor, y: Tensor) -> Scalars:
        """Hinge loss on images and on the reconstructions that G was just trained with."""
        real, fake = self.discriminator(x), self.discriminator(y)
        loss = hinge_discriminator(real, fake)
        self.discriminator.backward(loss)
        self.discriminator.step()
        return {
            "gan_d": loss,
            "logits_real": real.mean(),
            "logits_fake": fake.mean(),
            "disc_accuracy": accuracy(real, fake),
        }

    def _total(self, scalars: Scalars, codebook: Tensor) -> Scalars:
        """The generator's loss from its terms."""
        loss = scalars["rec"] + self.loss.perceptual_weight * scalars["perceptual"]
        loss = loss + self.loss.codebook_weight * codebook
        if "gan_g" in scalars:
            loss = loss + self.loss.disc_weight * scalars["adaptive_weight"] * scalars["gan_g"]
        return {"loss": loss, "codebook": codebook}

    def _update_codebook(self, parts: list[Statistics], clock: Clock) -> None:
        """Bring the statistics of all micro-batches and ranks together, the same everywhere."""
        counts = self.world.sum(torch.stack([part.counts for part in parts]).sum(0))
        sums = [part.sums for part in parts if part.sums is not None]
        candidates = [part.candidates for part in parts if part.candidates is not None]
        whole = Statistics(
            counts,
            self.world.sum(torch.stack(sums).sum(0)) if sums else None,
            self.world.join_samples(torch.cat(candidates)) if candidates else None,
        )
        self.usage.add(counts)
        randomness = torch.Generator().manual_seed(mix(self.seed, clock.images))
        quantizer = self.generator.module.quantize
        self.revived += quantizer.update(whole, randomness)

    def window_metrics(self) -> dict[str, float]:
        metrics = self.usage.take() | {"codebook_revived": float(self.revived)}
        metrics["lr"] = self.generator.lr
        norm = self.generator.gradient_norm()
        if norm is not None:
            metrics["gradient_norm"] = norm
        self.revived = 0
        return metrics

    @torch.no_grad()
    def validate(self, batches: Iterable[tuple[Any, bool]]) -> dict[str, float]:
        network = self.generator.module.eval()
        figures = ReconstructionFigures(network.config.vocabulary, self.lpips, mean_colour=False)
        figures.sums = figures.sums.to(self.world.device)
        for batch, counts in batches:
            images = self._images(batch)
            with self.generator.autocast():
                out = network(images)
            if counts:
                figures.update(images, out.images, out.codes)
        network.train()
        self.world.sum(figures.sums)
        return {name.removeprefix("val_"): value for name, value in figures.compute().items()}

    @torch.no_grad()
    def preview(self, batch: Any) -> Tensor:
        """Images above, their reconstructions below."""
        network = self.generator.module.eval()
        images = self._images(batch)
        with self.generator.autocast():
            rows = torch.stack([images, network(images).images.float()])
        network.train()
        picture = rearrange(rows, "r b c h w -> c (r h) (b w)")
        return ((picture.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)

    def _images(self, batch: Any) -> Tensor:
        """uint8 -> [-1, 1], on the device."""
        return batch.images.to(self.world.device, non_blocking=True).float() / 127.5 - 1

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass

    def export(self, folder: Path) -> None:
        state = self.generator.full_state()
        if state is not None:
            write_export(VQGAN, self.generator.module.config, state, folder)
