"""Measuring a set of images: its distance from a reference, and the training images that look most
like it."""

from pathlib import Path

import torch
from torch import Tensor

from taming_dist.copies import to_device
from taming_dist.engine.world import World
from taming_dist.errors import UserError
from taming_dist.evaluation.config import EvaluateConfig, refuse
from taming_dist.evaluation.distribution import (
    SPLITS,
    OfClasses,
    distances,
    frechet,
    frechet_by_class,
    inception_score,
)
from taming_dist.evaluation.features import Features
from taming_dist.evaluation.folder import prepare_folder
from taming_dist.evaluation.nearest import Nearest, save_nearest
from taming_dist.evaluation.protocol import CENTRE, LANCZOS, Measured, Protocol, digest_of
from taming_dist.evaluation.reference import Reference, open_reference
from taming_dist.evaluation.sources import Intake, Source, open_source, read
from taming_dist.inception import LOGITS, SPATIAL_LAYER, Inception, inception
from taming_dist.losses.perceptual import LPIPS
from taming_dist.pretrained import lpips_digest, lpips_network
from taming_dist.weights import digest

NO_CLASSIFIER = (
    "no inception_score: the network's classifier is not kept, see docs/evaluation.md for "
    "python tools/fetch_inception.py --classifier"
)


def evaluate_images(config: EvaluateConfig, world: World) -> Measured:
    """The figures of given images, on the first rank (collective).

    Raises:
        UserError: images, reference, settings or a folder that cannot be used.
    """
    refuse(config, ("model", "data", "vqgan", "n"), "given images need none, leave it out")
    images = open_source("images", config.images)
    comparison = Comparison(config, world)
    prepare_folder(Path(config.out), world)
    measured = Measured({"kind": "images"})
    comparison.add_to(measured, images)
    return measured


class Comparison:
    """What sets of images are compared with, opened and checked before any of them is read."""

    def __init__(self, config: EvaluateConfig, world: World) -> None:
        """Open what `config` names.

        Raises:
            UserError: it names nothing, or a set or a network is not there.
        """
        self.config, self.world = config, world
        self.network: Inception | None = None
        self.lpips: LPIPS | None = None
        if config.reference is None and config.training is None:
            raise UserError(
                "reference=... is missing: a folder of pictures, an npz file or image shards that "
                "the images are compared with"
            )
        if config.reference is not None:
            if config.features == "none":
                raise UserError("features=none: images are compared by features, leave it out")
            weights = "random" if config.features == "random" else "pretrained"
            self.network = inception(weights).to(world.device)
        if config.training is not None:
            self.training = open_source("training", config.training)
            asked = config.lpips_nets["lpips"], config.lpips_weights
            self.lpips = lpips_network(*asked).to(world.device)
            self.digest = lpips_digest(*asked)

    def add_to(self, measured: Measured, images: Source) -> None:
        """Have the first rank add the figures of a set of images (collective).

        The others are cut to their size unless `size` says another for all.
        """
        made = None if self.network is None else Features.with_spatial(self.network)
        examined: dict[int, Tensor] = {}
        sides: set[tuple[int, ...]] = set()
        count = 0
        for pixels, ids, classes in read(images, self._intake(self.config.size), self.world):
            sides.add(tuple(pixels.shape[2:]))
            count += len(pixels)
            for row, number in enumerate(ids.tolist()):
                if self.lpips is not None and number < self.config.examined:
                    examined[number] = pixels[row].clone()
            if made is not None:
                made.add(to_device(pixels, self.world.device), ids, classes)
        size = common_side(sides, images, self.world)
        count = sum(self.world.gather(count))
        if self.world.is_first:
            name = "images" if "images" not in measured.facts else "samples"
            measured.facts |= {name: count, f"{name}_fingerprint": images.fingerprint}
        if made is not None and self.network is not None:
            self._add_distances(measured, made, self.network, size)
        if self.lpips is not None:
            self._add_nearest(measured, examined, self.lpips, size)

    def _intake(self, size: int | None) -> Intake:
        config = self.config
        return Intake(config.batch, size, config.threads, config.max_bad_fraction)

    def _add_distances(
        self, measured: Measured, made: Features, network: Inception, size: int | None
    ) -> None:
        found, classes = made.gathered(self.world), made.classes(self.world)
        intake = self._intake(size)
        reference = open_reference(self.config.reference, network, intake, self.world)
        if self.world.is_first:
            add_distances(measured, found, reference, size, network, classes)

    def _add_nearest(
        self, measured: Measured, examined: dict[int, Tensor], lpips: LPIPS, size: int | None
    ) -> None:
        known: dict[int, Tensor] = {}
        for part in self.world.gather({number: own.numpy() for number, own in examined.items()}):
            known |= {number: torch.from_numpy(own) for number, own in part.items()}
        given = torch.stack([known[number] for number in sorted(known)])
        nearest = Nearest(lpips, given, self.config.neighbours)
        seen = 0
        for pixels, ids, _ in read(self.training, self._intake(size), self.world):
            seen += len(pixels)
            nearest.update(pixels, ids)
        nearest.gather(self.world)
        seen = sum(self.world.gather(seen))
        if self.world.is_first:
            asked = (len(given), seen, self.training.fingerprint, size, *how(size), "float32")
            measured.add(nearest.figures(sorted(known)), Protocol(*asked, self.digest))
            save_nearest(nearest, Path(self.config.out))


def common_side(sides: set[tuple[int, ...]], images: Source, world: World) -> int | None:
    """The side of images that are square; None of others (collective).

    Raises:
        UserError: their sizes differ, or there are no images.
    """
    found: set[tuple[int, ...]] = set().union(*world.gather(sides))
    if len(found) != 1:
        shapes = " and ".join("x".join(map(str, shape)) for shape in sorted(found)[:2])
        fix = f"has {shapes} pixels: give size=, to which all are cut" if found else "has no images"
        raise UserError(f"{images.key}: it {fix}")
    ((height, width),) = found
    return height if height == width else None


def how(size: int | None) -> tuple[str, str]:
    """The crop and filter of a protocol."""
    return ("", "") if size is None else (CENTRE, LANCZOS)


def add_distances(
    measured: Measured,
    made: Tensor,
    reference: Reference,
    size: int | None,
    network: Inception,
    classes: Tensor | None = None,
) -> None:
    """Add the distances of features [n, d + s] from a reference; also of each class, where the
    images have `classes` int64 [n] and those of the reference have some.

    Raises:
        UserError: there are too few images.
    """
    own, spatial = network.parted(made)
    real, real_spatial = None, None
    if reference.features is not None:
        real, real_spatial = network.parted(reference.features)
    found = distances(own, real, reference.statistics)
    asked = (len(made), reference.images, reference.fingerprint, size, *how(size), "uint8")
    measured.add(found, Protocol(*asked, network.digest, network.layer))
    if real_spatial is not None or reference.spatial is not None:
        sfid = frechet(spatial, real_spatial, reference.spatial)
        measured.add({"sfid": sfid}, Protocol(*asked, network.digest, SPATIAL_LAYER))
    if real is not None and classes is not None and reference.classes is not None:
        by_class = frechet_by_class(OfClasses(own, classes), OfClasses(real, reference.classes))
        counts = [by_class["images_by_class"], by_class["reference_images_by_class"]]
        found_by = Protocol(*asked, network.digest, network.layer, digest_of(counts))
        measured.add(by_class, found_by)
    if network.classifier is None:
        measured.notes.append(NO_CLASSIFIER)
    elif len(made) < SPLITS:
        measured.notes.append(f"no inception_score: it needs {SPLITS} images, not {len(made)}")
    else:
        alone = (len(made), 0, "", size, *how(size), "uint8")
        weights = f"{network.digest}+{digest({'fc.weight': network.classifier})}"
        score = inception_score(own, network.classifier)
        measured.add(score, Protocol(*alone, weights, LOGITS))
