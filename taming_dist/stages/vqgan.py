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

from taming_dist.engine.zero import Engine
from taming_dist.evaluation.reconstruction import ReconstructionFigures
from taming_dist.losses.perceptual import LPIPS
from taming_dist.losses.reconstruction import l1, l2
from taming_dist.models.quantizers import Statistics
from taming_dist.models.vqgan import Reconstruction, VQGANConfig
from taming_dist.pretrained import frozen_features, lpips_network
from taming_dist.stages.adaptive import ADAPTIVE
from taming_dist.stages.adversary import Adversary, VQGANLossConfig
from taming_dist.stages.autoencoder import Autoencoder
from taming_dist.stages.setup import Setup
from taming_dist.stages.trained import begin_step
from taming_dist.training.clock import Clock
from taming_dist.training.recipe import Scalars

__all__ = ["VQGANLossConfig", "VQGANRecipe"]


class VQGANRecipe:
    """Trains E, codebook and G against a discriminator D."""

    def __init__(
        self,
        model: VQGANConfig,
        loss: VQGANLossConfig,
        setup: Setup,
        initial: Mapping[str, Tensor] | None = None,
        initial_discriminator: Mapping[str, Tensor] | None = None,
    ) -> None:
        """`initial`: as in `Autoencoder`; `initial_discriminator`: the same for D."""
        self.setup, self.world, self.loss = setup, setup.world, loss
        self.autoencoder = Autoencoder(model, setup, initial)
        self.generator = self.autoencoder.engine
        lpips = lpips_network(loss.lpips_net, loss.lpips_weights)
        self.lpips: LPIPS = lpips.to(self.world.device)
        self.adaptive = ADAPTIVE[loss.adaptive](self.world, loss.adaptive_min, loss.adaptive_max)
        self.adversary: Adversary | None = None
        if loss.discriminator is not None:
            features = frozen_features(loss.discriminator)
            channels = model.modality.channels
            self.adversary = Adversary(loss, setup, channels, features, initial_discriminator)

    @property
    def engines(self) -> Mapping[str, Engine]:
        found = {"generator": self.generator}
        if self.adversary is not None:
            found["discriminator"] = self.adversary.engine
        return found

    def train_step(self, micro_batches: Iterable[Any], clock: Clock) -> Iterator[Scalars]:
        """One optimizer step of G and, in its turn, of D; yields the terms of each part."""
        gan_weight, adversary = self._begin(clock)
        statistics = []
        for batch in micro_batches:
            images = self.autoencoder.input(batch)
            out: Reconstruction = self.generator(images)
            reconstruction = out.images.detach().float().requires_grad_(True)

            rec, scalars = self._reconstruction_loss(images, reconstruction)
            gradient = self.generator.gradient(rec, reconstruction)
            if adversary is not None:
                adversary.next_batch(images)
            if adversary is not None and gan_weight > 0:
                gan = adversary.generator_loss(reconstruction)
                gan_gradient = self.generator.gradient(gan, reconstruction)
                weight = self.adaptive(out.features, gradient, gan_gradient)
                gradient = gradient + gan_weight * weight * gan_gradient
                scalars |= {"gan_g": gan, "adaptive_weight": weight}
                scalars |= {"gan_weight": gan_weight * weight}

            scalars |= self._total(scalars, out.codebook_loss)
            # its gradient at x^ is the sum above; its value means nothing
            surrogate = (out.images.float() * gradient).sum()
            surrogate = surrogate + self.loss.codebook_weight * out.codebook_loss
            self.generator.backward(surrogate, value=scalars["loss"])
            self.generator.step()
            if adversary is not None:
                scalars |= adversary.step(self._to_judge(images, reconstruction))

            statistics.append(out.statistics)
            yield scalars
        self._finish(statistics, clock)

    def _begin(self, clock: Clock) -> tuple[float, Adversary | None]:
        """The weight of the GAN and D, where it has its turn."""
        begin_step(self.engines, self.setup, clock)
        self.autoencoder.codebook.anneal(clock)
        if self.adversary is None or not self.loss.trains_discriminator(clock.step):
            return 0.0, None
        self.adversary.begin(clock)
        return self.loss.gan_weight(clock.step), self.adversary

    def _reconstruction_loss(self, x: Tensor, y: Tensor) -> tuple[Tensor, Scalars]:
        """|x - x^| (or its square, or both) + LPIPS(x, x^)."""
        pixels = perceptual = torch.zeros((), device=x.device)
        for weight, distance in ((self.loss.l1_weight, l1), (self.loss.l2_weight, l2)):
            if weight > 0:
                pixels = pixels + weight * distance(x, y)
        if self.loss.perceptual_weight > 0:
            perceptual = self.lpips(x, y, self.lpips.features(x)).mean()
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
        self.adaptive.finish(self.generator.moved)
        if self.adversary is not None:
            self.adversary.finish()
        self.autoencoder.codebook.update(statistics, clock)

    def window_metrics(self) -> dict[str, float]:
        metrics = self.autoencoder.window_metrics()
        if self.adversary is not None:
            judge = self.adversary.engine.window_metrics()
            metrics |= {f"disc_{name}": judge[name] for name in judge if name != "lr"}
        return metrics

    def validate(self, batches: Iterable[tuple[Any, bool]]) -> dict[str, float]:
        vocabulary = self.generator.module.config.vocabulary
        figures = ReconstructionFigures(vocabulary, self.lpips, mean_colour=False)
        return self.autoencoder.validate(batches, figures)

    def preview(self, batch: Any) -> Tensor:
        return self.autoencoder.preview(batch)

    def export(self, folder: Path) -> None:
        self.autoencoder.export(folder)

    def state_dict(self) -> dict[str, Any]:
        adversary = {} if self.adversary is None else self.adversary.state_dict()
        return self.adaptive.state_dict() | adversary

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.adaptive.load_state_dict(state)
        if self.adversary is not None:
            self.adversary.load_state_dict(state)
