"""Stage 1: the VQGAN. Source: arXiv 2012.09841, section 3.1, equations 4 to 7.

One step walks through every network once. The generator's graph is cut at the reconstruction x^:
each loss gives its gradient at x^, the adaptive weight comes from those two gradients and the
decoder's last convolution alone, and one backward pass takes their sum through G and E.
"""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from taming_dist.data.images import to_float
from taming_dist.engine.settings import EngineConfig
from taming_dist.engine.world import World
from taming_dist.engine.zero import Engine
from taming_dist.evaluation.reconstruction import ReconstructionFigures
from taming_dist.generation.pictures import sheet, to_uint8
from taming_dist.losses.perceptual import LPIPS
from taming_dist.losses.reconstruction import l1, l2
from taming_dist.models.discriminators import build_discriminator
from taming_dist.models.quantizers import Statistics
from taming_dist.models.vqgan import VQGAN, Reconstruction, VQGANConfig
from taming_dist.pretrained import frozen_features, lpips_network
from taming_dist.recipes.adaptive import ADAPTIVE
from taming_dist.recipes.adversary import Adversary, VQGANLossConfig
from taming_dist.training.clock import Clock
from taming_dist.training.export import write_export
from taming_dist.training.metrics import CodeUsage
from taming_dist.training.optimization import OptimConfig, mix, seed_step
from taming_dist.training.recipe import Scalars

__all__ = ["VQGANLossConfig", "VQGANRecipe"]


class VQGANRecipe:
    """Trains E, codebook and G against a discriminator D."""

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
        initial: Mapping[str, Tensor] | None = None,
        initial_discriminator: Mapping[str, Tensor] | None = None,
    ) -> None:
        """`initial`: the weights of E, codebook and G to start from, instead of random ones; and
        those of D."""
        self.loss, self.optim, self.world, self.seed = loss, optim, world, seed
        self.lpips: LPIPS = lpips_network(loss.lpips_net, loss.lpips_weights).to(world.device)
        self.adaptive = ADAPTIVE[loss.adaptive](world, loss.adaptive_min, loss.adaptive_max)
        torch.manual_seed(seed)  # the same initial weights everywhere
        vqgan = VQGAN(model)
        if initial is not None:
            vqgan.load_state_dict(initial)
        vqgan.quantize.average = world.average()
        cut = (optim, engine, world, micro_batch, accumulation)
        self.adversary: Adversary | None = None
        if loss.discriminator is not None:
            network = build_discriminator(loss.discriminator, model.image_channels)
            if initial_discriminator is not None:
                network.load_state_dict(initial_discriminator)
            features = frozen_features(loss.discriminator)
            self.adversary = Adversary(network, loss, *cut, seed, features)
        groups = [{"params": list(vqgan.parameters())}]
        self.generator = Engine(vqgan, groups, *cut, optim.ema_half_life)
        self.usage = CodeUsage(model.vocabulary, world.device)
        self.revived = 0
        self.annealed: dict[str, float] = {}

    @property
    def engines(self) -> Mapping[str, Engine]:
        if self.adversary is None:
            return {"generator": self.generator}
        return {"generator": self.generator, "discriminator": self.adversary.engine}

    def train_step(self, micro_batches: Iterable[Any], clock: Clock) -> Iterator[Scalars]:
        """One optimizer step of G and, in its turn, of D; yields the terms of each part."""
        gan_weight, adversary = self._begin(clock)
        statistics = []
        for batch in micro_batches:
            images = self._images(batch)
            out: Reconstruction = self.generator(images)
            reconstruction = out.images.detach().float().requires_grad_(True)

            rec, scalars = self._reconstruction_loss(images, reconstruction)
            (gradient,) = torch.autograd.grad(rec, reconstruction)
            if adversary is not None:
                adversary.next_batch(images)
            if adversary is not None and gan_weight > 0:
                gan = adversary.generator_loss(reconstruction)
                (gan_gradient,) = torch.autograd.grad(gan, reconstruction)
                weight = self.adaptive(out.features, gradient, gan_gradient)
                gradient = gradient + gan_weight * weight * gan_gradient
                scalars |= {"gan_g": gan, "adaptive_weight": weight}
                scalars |= {"gan_weight": gan_weight * weight}

            # its gradient at x^ is the sum above; its value means nothing
            surrogate = (out.images.float() * gradient).sum()
            self.generator.backward(surrogate + self.loss.codebook_weight * out.codebook_loss)
            self.generator.step()
            if adversary is not None:
                scalars |= adversary.step(self._to_judge(images, reconstruction))

            statistics.append(out.statistics)
            yield scalars | self._total(scalars, out.codebook_loss)
        self._finish(statistics, clock)

    def _begin(self, clock: Clock) -> tuple[float, Adversary | None]:
        """Seeds and learning rates; gives the weight of the GAN and D, where it has its turn."""
        seed_step(self.seed, clock, self.world.rank)
        for engine in self.engines.values():
            engine.set_lr(self.optim.learning_rate(clock))
        quantizer = self.generator.module.quantize
        self.annealed = quantizer.anneal(clock.images / clock.total_images)
        if self.adversary is None or not self.loss.trains_discriminator(clock.step):
            return 0.0, None
        self.adversary.begin(clock)
        return self.loss.gan_weight(clock.step), self.adversary

    def _reconstruction_loss(self, x: Tensor, y: Tensor) -> tuple[Tensor, Scalars]:
        """|x - x^| (or its square, or both) + LPIPS(x, x^)."""
        perceptual = self.lpips(x, y, self.lpips.features(x)).mean()
        pixels = torch.zeros((), device=x.device)
        for weight, distance in ((self.loss.l1_weight, l1), (self.loss.l2_weight, l2)):
            if weight > 0:
                pixels = pixels + weight * distance(x, y)
        total = pixels + self.loss.perceptual_weight * perceptual
        return total, {"rec": pixels, "perceptual": perceptual}

    def _to_judge(self, x: Tensor, y: Tensor) -> Tensor:
        """What D is shown: x^ as G was just trained with it, or, as the original does, as G makes
        it after its update."""
        if self.loss.order == "reused":
            return y
        with torch.no_grad(), self.generator.autocast():
            return self.generator.module(x).images

    def _total(self, scalars: Scalars, codebook: Tensor) -> Scalars:
        """The generator's loss from its terms."""
        loss = scalars["rec"] + self.loss.perceptual_weight * scalars["perceptual"]
        loss = loss + self.loss.codebook_weight * codebook
        if "gan_g" in scalars:
            loss = loss + scalars["gan_weight"] * scalars["gan_g"]
        return {"loss": loss, "codebook": codebook}

    def _finish(self, statistics: list[Statistics], clock: Clock) -> None:
        """What moves once per optimizer step, by all micro-batches and ranks together."""
        self.adaptive.finish()
        if self.adversary is not None:
            self.adversary.finish()
        self._update_codebook(statistics, clock)

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
        self.revived += quantizer.update(whole, randomness, self.generator.replace_rows)

    def window_metrics(self) -> dict[str, float]:
        metrics = self.usage.take() | {"codebook_revived": float(self.revived)}
        metrics |= self.annealed | {"lr": self.generator.lr}
        norm = self.generator.gradient_norm()
        if norm is not None:
            metrics["gradient_norm"] = norm
        self.revived = 0
        return metrics

    @torch.no_grad()
    def validate(self, batches: Iterable[tuple[Any, bool]]) -> dict[str, float]:
        vocabulary = self.generator.module.config.vocabulary
        figures = ReconstructionFigures(vocabulary, self.lpips, mean_colour=False)
        figures.sums = figures.sums.to(self.world.device)
        with self.generator.evaluated() as network:
            for batch, counts in batches:
                images = self._images(batch)
                with self.generator.autocast():
                    out = network(images)
                if counts:
                    figures.update(images, out.images, out.codes)
        self.world.sum(figures.sums)
        return {name.removeprefix("val_"): value for name, value in figures.compute().items()}

    @torch.no_grad()
    def preview(self, batch: Any) -> Tensor:
        """Images above, their reconstructions below."""
        images = self._images(batch)
        with self.generator.evaluated() as network, self.generator.autocast():
            reconstructions = network(images).images
        pairs = torch.cat([images, reconstructions.float()])
        return sheet(to_uint8(pairs), columns=len(images))

    def _images(self, batch: Any) -> Tensor:
        """uint8 -> [-1, 1], on the device."""
        return to_float(batch.images.to(self.world.device, non_blocking=True))

    def state_dict(self) -> dict[str, Any]:
        adversary = {} if self.adversary is None else self.adversary.state_dict()
        return self.adaptive.state_dict() | adversary

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.adaptive.load_state_dict(state)
        if self.adversary is not None:
            self.adversary.load_state_dict(state)

    def export(self, folder: Path) -> None:
        state = self.generator.full_state()
        if state is not None:
            write_export(VQGAN, self.generator.module.config, state, folder)
