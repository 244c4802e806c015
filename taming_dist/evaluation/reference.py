"""What sets of images are compared with: features that are kept between evaluations, or statistics
that others have published."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from taming_dist.access import require_readable
from taming_dist.atomic import write_bytes
from taming_dist.caches import cache_folder
from taming_dist.copies import to_device
from taming_dist.engine.world import World
from taming_dist.evaluation import archives
from taming_dist.evaluation.features import Features
from taming_dist.evaluation.sources import ArrayOfImages, Intake, Source, open_source, read
from taming_dist.inception import SPATIAL_LAYER, Inception

FEATURES, CLASSES = "features", "classes"  # of a kept file


@dataclass(frozen=True)
class Reference:
    """The features fp32 [m, d + s] of the images compared with, and, where a file has them, the
    statistics `mu` and `sigma` that FID is taken from, and `spatial` ones of sFID; any may be
    missing. `features` and, where all images have one, their `classes` int64 [m] are on the first
    rank only."""

    fingerprint: str
    features: Tensor | None = None
    statistics: dict[str, np.ndarray] | None = None
    spatial: dict[str, np.ndarray] | None = None
    classes: Tensor | None = None

    @property
    def images(self) -> int:
        """How many there are; 0 where a file does not say."""
        return 0 if self.features is None else len(self.features)


def open_reference(
    value: Any, network: Inception, intake: Intake, world: World, key: str = "reference"
) -> Reference:
    """What `key=` names: images as in `sources`, or an npz file with statistics (collective).

    Raises:
        UserError: it cannot be read.
    """
    source: Source
    statistics = spatial = None
    if isinstance(value, str) and value.endswith(".npz"):
        path = Path(value)
        require_readable(value)
        found = archives.Contents.open(key, path, network.dim, network.spatial_dim)
        statistics, spatial = found.statistics, found.spatial
        if found.rows is None:
            return Reference(archives.file_hash(path), None, statistics, spatial)
        source = ArrayOfImages(key, found.rows)
    else:
        source = open_source(key, value)
    fingerprint = world.broadcast(source.fingerprint if world.is_first else None)
    file = kept_file(fingerprint, intake.size, network)
    kept = kept_features(file) if world.is_first else None
    if not world.broadcast(kept is not None):
        kept = features_of(source, network, intake, world)
        if world.is_first:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(file, save(kept))
    kept = kept or {}
    return Reference(fingerprint, kept.get(FEATURES), statistics, spatial, kept.get(CLASSES))


def features_of(
    source: Source, network: Inception, intake: Intake, world: World
) -> dict[str, Tensor]:
    """Of all images of a set, on every rank, `FEATURES` [n, d + s] and, where all have one, their
    `CLASSES` int64 [n] (collective)."""
    features = Features.with_spatial(network)
    for some in read(source, intake, world):
        features.add(to_device(some.pixels, world.device), some.ids, some.classes)
    found, classes = {FEATURES: features.gathered(world)}, features.classes(world)
    return found if classes is None else found | {CLASSES: classes}


def kept_file(fingerprint: str, size: int | None, network: Inception) -> Path:
    """Where the features of a set are kept: by all that they depend on."""
    facts = json.dumps(
        [fingerprint, size, network.digest, network.layer, SPATIAL_LAYER, CLASSES], allow_nan=False
    )
    name = hashlib.sha256(facts.encode()).hexdigest()[:32]
    return cache_folder() / "references" / f"{name}.safetensors"


def kept_features(file: Path) -> dict[str, Tensor] | None:
    """What an earlier evaluation has found; None if there is nothing that can be read."""
    try:
        found = load_file(file)
    except (OSError, SafetensorError):
        return None
    return found if FEATURES in found else None
