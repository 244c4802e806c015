"""The weight of the GAN loss against the reconstruction loss: equation 7 of arXiv 2012.09841.

Every adaptive variant takes d loss / d W of either loss at the decoder's last convolution W, from
the gradients at the reconstruction, without a walk through the network; they differ in over what
these are averaged before their norms are compared. `Fixed` asks nothing of the gradients.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from taming_dist.engine.world import World
from taming_dist.losses.adversarial import adaptive_weight
from taming_dist.models.autoencoder import last_layer_gradients


@dataclasses.dataclass(frozen=True)
class Weighed:
    """`weight`: lambda for one micro-batch, a scalar. `gradients` [2,out,c,3,3]: d rec / d W and
    d gan / d W of it, where the next optimizer step's lambda comes from them."""

    weight: Tensor
    gradients: Tensor | None = None


class AdaptiveWeight:
    """What gives lambda, from `smallest` to `largest`; called once per micro-batch. `dtype`: what
    is multiplied for it is rounded to."""

    def __init__(
        self, world: World, smallest: float, largest: float, dtype: torch.dtype = torch.float32
    ) -> None:
        self.world, self.smallest, self.largest, self.dtype = world, smallest, largest, dtype

    def __call__(self, features: Tensor, rec: Tensor, gan: Tensor) -> Weighed:
        """Lambda for one micro-batch.

        features [b,c,h,w]: the input of W; rec, gan [b,out,h,w]: gradients at the reconstruction.
        """
        raise NotImplementedError

    def update(self, parts: Sequence[Weighed], moved: Tensor) -> None:
        """Take in what was found for the micro-batches of an optimizer step; `moved`, a flag on the
        device: it was not skipped."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass

    def _ratio(self, gradients: Tensor) -> Tensor:
        """0 for gradients that are not finite: their step is skipped, and the log stays finite."""
        weight = adaptive_weight(gradients[0], gradients[1], self.smallest, self.largest)
        return weight.where(gradients.isfinite().all(), 0.0)


class Global(AdaptiveWeight):
    """Averaged over all ranks for each micro-batch: one value everywhere, however many ranks."""

    def __call__(self, features: Tensor, rec: Tensor, gan: Tensor) -> Weighed:
        gradients = last_layer_gradients(features, [rec, gan], self.dtype)
        return Weighed(self._ratio(self.world.mean(gradients)))


class PerRank(AdaptiveWeight):
    """Each rank's own, as the original has it: depends on the number of ranks."""

    def __call__(self, features: Tensor, rec: Tensor, gan: Tensor) -> Weighed:
        return Weighed(self._ratio(last_layer_gradients(features, [rec, gan], self.dtype)))


class Lagged(AdaptiveWeight):
    """The previous optimizer step's, over its whole global batch: the same however the batch is cut
    into micro-batches and ranks. The first step has none yet; its GAN term gets weight 0."""

    def __init__(
        self, world: World, smallest: float, largest: float, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__(world, smallest, largest, dtype)
        self._weight = torch.zeros((), device=world.device)

    def __call__(self, features: Tensor, rec: Tensor, gan: Tensor) -> Weighed:
        return Weighed(self._weight, last_layer_gradients(features, [rec, gan], self.dtype))

    def update(self, parts: Sequence[Weighed], moved: Tensor) -> None:
        gradients = [part.gradients for part in parts if part.gradients is not None]
        if gradients:
            weight = self._ratio(self.world.mean(torch.stack(gradients).mean(0)))
            self._weight = torch.where(moved, weight, self._weight)

    def state_dict(self) -> dict[str, Any]:
        return {"lagged": float(self._weight)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._weight = torch.tensor(state.get("lagged", 0.0), device=self.world.device)


class Fixed(AdaptiveWeight):
    """1, whatever the gradients: nothing is computed of them, and nothing crosses the ranks."""

    def __call__(self, features: Tensor, rec: Tensor, gan: Tensor) -> Weighed:
        return Weighed(torch.ones((), device=features.device))


ADAPTIVE: dict[str, type[AdaptiveWeight]] = {
    "global": Global,
    "per_rank": PerRank,
    "lagged": Lagged,
    "fixed": Fixed,
}
