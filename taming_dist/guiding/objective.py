"""How far the embeddings of a picture's cut-outs are from those of what is asked for.

Legend: n cut-outs, m targets, e numbers of an embedding.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


def spherical_distance(one: Tensor, other: Tensor) -> Tensor:
    """Half of the squared angle (radians) between each of [n, e] and each of [m, e], [n, m].

    By the half-angle's tangent |u - v| / |u + v|, which is exact for small angles and has a finite
    gradient at opposite vectors, where that of the arc sine has none. Source: arXiv 2204.08583,
    section 3.1.
    """
    u, v = F.normalize(one.float(), dim=-1)[:, None], F.normalize(other.float(), dim=-1)[None]
    apart, together = (
        torch.linalg.vector_norm(u - v, dim=-1),
        torch.linalg.vector_norm(u + v, dim=-1),
    )
    return 2 * torch.atan2(apart, together).square()


@dataclass(frozen=True)
class Objective:
    """The mean over cut-outs of their distances from `targets` [m, e], each times its share of
    `shares` [m], whose absolute values sum to 1."""

    targets: Tensor
    shares: Tensor

    @classmethod
    def of(cls, targets: Tensor, weights: Sequence[float]) -> "Objective":
        """That of weights of any size."""
        given = torch.tensor(weights, dtype=torch.float64)
        return cls(targets, (given / given.abs().sum()).float().to(targets.device))

    def __call__(self, embeddings: Tensor) -> Tensor:
        """Embeddings [n, e] of cut-outs -> the loss []."""
        return spherical_distance(embeddings, self.targets).mean(0) @ self.shares
