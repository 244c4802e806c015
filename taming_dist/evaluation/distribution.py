"""How far a set of images is from another, by features of each: one distance for all of them.

Frechet distance (FID): arXiv 1706.08500, of spatial features (sFID): arXiv 2103.03841; kernel
distance (KID): arXiv 1801.01401; precision and recall: arXiv 1904.06991; of one set alone the
Inception Score: arXiv 1606.03498; these are computed by `torch-fidelity`, with its settings.
Density and coverage, which outliers of the real images sway less: arXiv 2002.09797.

Legend: n images made, m real ones, d features.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from taming_dist.errors import UserError
from taming_dist.vision import torchvision_models

LEAST = 6  # images of either set: the fifth neighbour of each
SPLITS = 10  # of the Inception Score, which is their mean
KID_SUBSETS, KID_SUBSET, KID_SEED = 100, 1000, 2020
NEIGHBOURS, WIDER = 3, 5  # of precision and recall; of density and coverage
ROWS = 1024  # of a block of distances
HIGHER_IS_BETTER = {
    "fid": False,
    "kid": False,
    "precision": True,
    "recall": True,
    "density": True,
    "coverage": True,
}


@dataclass(frozen=True)
class OfClasses:
    """Features [n,d] of images of classes int64 [n]."""

    features: Tensor
    classes: Tensor

    def of(self, number: int) -> Tensor:
        """The features of the images of one class."""
        return self.features[self.classes == number]


def distances(
    made: Tensor, real: Tensor | None = None, statistics: Mapping[str, np.ndarray] | None = None
) -> dict[str, float]:
    """The figures of `HIGHER_IS_BETTER` from features [n,d] and [m,d], on the CPU.

    `statistics`, `mu` [d] and `sigma` [d,d], are those that FID is taken from instead of `real`'s;
    without `real` there is no other figure. Fewer than d images leave the covariances of FID
    without full rank, and fewer than 1,000 of either set make KID's subsets smaller: figures of
    different numbers of images do not compare.

    Raises:
        UserError: there are too few images.
    """
    fewest = min(len(features) for features in (made, real) if features is not None)
    if fewest < LEAST:
        raise UserError(f"{fewest} images are too few to be compared, use {LEAST} or more")
    made = made.cpu()
    found = {"fid": frechet(made, real, statistics)}
    return found if real is None else found | neighbourhoods(made, real.cpu())


def frechet(
    made: Tensor, real: Tensor | None = None, statistics: Mapping[str, np.ndarray] | None = None
) -> float:
    """The Frechet distance of features [n,d] from others [m,d], or from their statistics."""
    torchvision_models("FID")  # which torch-fidelity imports, where its operators may not load
    from torch_fidelity.metric_fid import (
        KEY_METRIC_FID,
        fid_features_to_statistics,
        fid_statistics_to_metric,
    )

    if statistics is None:
        assert real is not None
        statistics = fid_features_to_statistics(real.cpu())
    both = [
        {name: part[name].astype(np.float64) for name in ("mu", "sigma")}  # others have either
        for part in (fid_features_to_statistics(made.cpu()), statistics)
    ]
    return float(fid_statistics_to_metric(*both, verbose=False)[KEY_METRIC_FID])


def frechet_by_class(made: OfClasses, real: OfClasses) -> dict[str, list[float] | list[int]]:
    """`fid_by_class`, the Frechet distances of the images of each class, in the order of the
    classes' numbers (NaN where there are fewer than `LEAST` of either set), up to the highest class
    of the images made; and how many images each is of, `images_by_class` and
    `reference_images_by_class`."""
    classes = int(made.classes.max()) + 1
    counts = [each.classes.bincount(minlength=classes)[:classes].tolist() for each in (made, real)]
    found = [
        frechet_of_few(made.of(number), real.of(number)) if min(several) >= LEAST else math.nan
        for number, several in enumerate(zip(*counts, strict=True))
    ]
    return {
        "fid_by_class": found,
        "images_by_class": counts[0],
        "reference_images_by_class": counts[1],
    }


def frechet_of_few(made: Tensor, real: Tensor) -> float:
    """The distance of `frechet` of features [n,d] and [m,d] without their covariances [d,d],
    which are slow to take a root of where n and m are small beside d.

    With centred features A [n,d], B [m,d], over the roots of n - 1 and m - 1, the covariances are
    A'A and B'B, and the trace of the root of their product is the sum of the singular values of
    AB' [n,m].
    """
    sets = [each.cpu().double() for each in (made, real)]
    means = [each.mean(0) for each in sets]
    one, other = (
        (each - mean) / math.sqrt(len(each) - 1) for each, mean in zip(sets, means, strict=True)
    )
    traces = one.square().sum() + other.square().sum()
    small = [
        torch.linalg.qr(each, mode="r").R if len(each) > each.shape[1] else each
        for each in (one, other)
    ]
    root = torch.linalg.svdvals(small[0] @ small[1].T).sum()
    return float((means[0] - means[1]).square().sum() + traces - 2 * root)


def inception_score(features: Tensor, classifier: Tensor) -> dict[str, float]:
    """The Inception Score of features [n,d] by a classifier [classes,d], and its standard deviation
    over splits; nothing of fewer images than there are splits."""
    from torch_fidelity.metric_isc import (
        KEY_METRIC_ISC_MEAN,
        KEY_METRIC_ISC_STD,
        isc_features_to_metric,
    )

    if len(features) < SPLITS:
        return {}
    found = isc_features_to_metric(features.cpu() @ classifier.T, splits=SPLITS)
    return {
        "inception_score": float(found[KEY_METRIC_ISC_MEAN]),
        "inception_score_std": float(found[KEY_METRIC_ISC_STD]),
    }


def neighbourhoods(made: Tensor, real: Tensor) -> dict[str, float]:
    """The figures that need the features of both sets, and not their statistics only."""
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    kid = kid_features_to_metric(
        made,
        real,
        kid_subsets=KID_SUBSETS,
        kid_subset_size=min(KID_SUBSET, len(made), len(real)),
        rng_seed=KID_SEED,
        verbose=False,
    )[KEY_METRIC_KID_MEAN]
    neighbours = {"prc_neighborhood": NEIGHBOURS, "save_cpu_ram": True, "verbose": False}
    found = prc_features_to_metric(made, real, **neighbours)
    density, coverage = density_and_coverage(made, real)
    return {
        "kid": float(kid),
        "precision": float(found["precision"]),
        "recall": float(found["recall"]),
        "density": density,
        "coverage": coverage,
    }


def density_and_coverage(
    made: Tensor, real: Tensor, neighbours: int = WIDER
) -> tuple[float, float]:
    """Of features [n,d] and [m,d]: in how many of the balls around real images an image that was
    made lies, as a share of `neighbours`; and the share of these balls in which any lies. A ball
    reaches to the `neighbours`-th of the other real images."""
    inside, covered = torch.zeros(len(made)), 0
    for rows in real.split(ROWS):
        radii = torch.cdist(rows, real).kthvalue(neighbours + 1).values
        holds = torch.cdist(rows, made) < radii[:, None]
        inside += holds.sum(0)
        covered += int(holds.any(1).sum())
    return float(inside.mean()) / neighbours, covered / len(real)
