"""The weight of the GAN loss against the reconstruction loss: equation 7 of arXiv 2012.09841.

Every adaptive variant takes d loss / d W of either loss at the decoder's last convolution W, from
the gradients at the reconstruction, without a walk through the network; they differ in over what
these are averaged before their norms are compared. `Fixed` asks nothing of the gradients.
"""

from typing import Any

import torch
from torch import Tensor

from taming_dist.engine.world import World
from taming_dist.losses.adversarial import adaptive_weight
from taming_dist.models.autoencoder import last_layer_gradient


class AdaptiveWeight:
    """Averaged over all ranks for each micro-batch: one value everywhere, however many ranks."""

    def __init__(self, world: World, smallest: float, largest: float) -> None:
        self.world, self.smallest, self.largest = world, smallest, largest

    def __call__(self, features: Tensor, rec: Tensor, gan: Tensor) -> Tensor:
        """The scalar lambda for one micro-batch.

        features [b,c,h,w]: the input of W; rec, gan [b,out,h,w]: gradients at the reconstruction.
        """
        return self._ratio(self.world.mean(at_last_layer(features, rec, gan)))

    def finish(self, moved: bool) -> None:
        """The optimizer step is over; `moved`: it was not skipped."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass

    def _ratio(self, gradients: Tensor) -> Tensor:
        """0 for gradients that are not finite: their step is skipped, and the log stays finite."""
        weight = adaptive_weight(gradients[0], gradients[1], self.smallest, self.largest)
        return weight.where(gradients.isfinite().all(), 0.0)


class Fixed(AdaptiveWeight):
    """1, whatever the gradients: nothing is computed of them, and nothing crosses the ranks."""

    def __call__(self, features: Tensor, rec: Tensor, gan: Tensor) -> Tensor:
        return torch.ones((), device=features.device)


class PerRank(AdaptiveWeight):
    """Each rank's own, as the original has it: depends on the number of ranks."""

    def __call__(self, features: Tensor, rec: Tensor, gan: Tensor) -> Tensor:
        return self._ratio(at_last_layer(features, rec, gan))


class Lagged(AdaptiveWeight):
    """The previous optimizer step's, over its whole global batch: the same however the batch is cut
    into micro-batches and ranks. The first step has none yet; its GAN term gets weight 0."""

    def __init__(self, world: World, smallest: float, largest: float) -> None:
        super().__init__(world, smallest, largest)
        self._weight = torch.zeros((), device=world.device)
        self._parts: list[Tensor] = []

    def __call__(self, features: Tensor, rec: Tensor, gan: Tensor) -> Tensor:
        self._parts.append(at_last_layer(features, rec, gan))
        return self._weight

    def finish(self, moved: bool) -> None:
        if self._parts and moved:
            self._weight = self._ratio(self.world.mean(torch.stack(self._parts).mean(0)))
        self._parts = []

    def state_dict(self) -> dict[str, Any]:
        return {"lagged": float(self._weight)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._weight = torch.tensor(state.get("lagged", 0.0), device=self.world.device)


def at_last_layer(features: Tensor, rec: Tensor, gan: Tensor) -> Tensor:
    """d rec / d W and d gan / d W [2,out,c,3,3]."""
    return torch.stack([last_layer_gradient(features, gradient) for gradient in (rec, gan)])


ADAPTIVE: dict[str, type[AdaptiveWeight]] = {
    "global": AdaptiveWeight,
    "per_rank": PerRank,
    "lagged": Lagged,
    "fixed": Fixed,
}
