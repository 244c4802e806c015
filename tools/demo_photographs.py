"""Cut the demo's images from the photographs that lie inside scikit-image and scikit-learn.

    python tools/demo_photographs.py --out DIR [--size 64] [--crops 250]

Makes {train,val}/images/<photo>/*.png and, with the same names, {train,val}/segmentations/. A photo
is a class, and a crop shows most of it. Training and validation differ in the scale of the crops,
not in the photographs: validation tells how a photo is met in a framing that training never had,
and nothing about other photographs. Label maps: k-means over smoothed Lab colour and position, 8
labels per photo.
"""

import importlib.util
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.Image import Resampling

from taming_dist import cli
from taming_dist.errors import UserError
from taming_dist.formats.strict_json import write_json

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Photograph:
    """A file of an installed package; `centre`: where its subject is, as a share of its width."""

    package: str
    file: str
    centre: float = 0.5


PHOTOGRAPHS = {
    "astronaut": Photograph("skimage", "data/astronaut.png"),
    "brick": Photograph("skimage", "data/brick.png"),
    "cat": Photograph("skimage", "data/chelsea.png"),
    "coffee": Photograph("skimage", "data/coffee.png", 0.47),
    "coins": Photograph("skimage", "data/coins.png"),
    "flower": Photograph("sklearn", "datasets/images/flower.jpg", 0.48),
    "galaxies": Photograph("skimage", "data/hubble_deep_field.jpg"),
    "motorcycle": Photograph("skimage", "data/motorcycle_left.png", 0.52),
    "pagoda": Photograph("sklearn", "datasets/images/china.jpg", 0.33),
    "retina": Photograph("skimage", "data/retina.jpg"),
    "rocket": Photograph("skimage", "data/rocket.jpg"),
    "tissue": Photograph("skimage", "data/ihc.png"),
}
NUM_LABELS = 8
VAL_SHARE = 0.16  # 40 validation crops to 250 for training
# The side of a crop, as a share of the photo's short side: the subject is always whole.
LEAST_SIDE = 0.8
SHIFT = 0.05  # of the short side: how far crops move along the long one, to either side
# Crops of the middle of these scales, from 0 for the smallest to 1, are for validation alone.
HELD_OUT = (0.4, 0.6)
OVERSAMPLING = 4  # of the photos to the crops: more would cost time and show nothing
PLACE_WEIGHT = 30.0  # Lab units across the whole photo: keeps labels in one piece
DONE = "photographs.json"


def main(argv: Sequence[str] | None = None) -> None:
    """Make the crops unless they exist already."""
    parser = cli.Parser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the crops")
    parser.add_argument("--size", type=cli.COUNT, default=64, help="pixels of a crop's side")
    parser.add_argument(
        "--crops", type=cli.COUNT, default=250, help="training crops per photograph"
    )
    args = parser.parse_args(argv)
    num_crops = {"train": args.crops, "val": max(1, round(args.crops * VAL_SHARE))}
    settings = {"size": args.size, "crops": num_crops, "photographs": sorted(PHOTOGRAPHS)}
    if is_done(args.out, settings):
        print(f"{args.out} already holds these crops; nothing to do")
        return
    for number, (name, photograph) in enumerate(sorted(PHOTOGRAPHS.items())):
        photo = shrunk(load(photograph), OVERSAMPLING * args.size)
        labels = label_map(photo, args.size)
        for split, count in num_crops.items():
            generator = np.random.default_rng([number, 0 if split == "train" else 1])
            boxes = framings(photo.size, photograph.centre, split, count, generator)
            save(cut(photo, labels, boxes, args.size), args.out / split, name)
    write_json(args.out / DONE, settings)
    total = {split: count * len(PHOTOGRAPHS) for split, count in num_crops.items()}
    print(f"{total['train']} training and {total['val']} validation crops in {args.out}")


def is_done(out: Path, settings: dict[str, object]) -> bool:
    """Whether a finished run with these settings exists; `UserError` if one with others does."""
    if not (out / DONE).exists():
        return False
    if json.loads((out / DONE).read_text()) != settings:
        raise UserError(f"--out {out} holds crops with other settings: delete it or choose another")
    return True


def load(photograph: Photograph) -> Image.Image:
    """A photograph from the installed package that contains it."""
    package = photograph.package
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"{package} is not installed: pip install -e '.[demo]'")
    path = Path(spec.submodule_search_locations[0], photograph.file)
    if not path.is_file():
        raise UserError(f"{path} is missing: reinstall {package} with pip install -e '.[demo]'")
    with Image.open(path) as image:
        return image.convert("RGB")


def shrunk(photo: Image.Image, short: int) -> Image.Image:
    """The photo with a short side of at most so many pixels."""
    scale = min(1.0, short / min(photo.size))
    width, height = (round(side * scale) for side in photo.size)
    return photo.resize((width, height), Resampling.LANCZOS)


def framings(
    size: tuple[int, int], centre: float, split: str, count: int, generator: np.random.Generator
) -> Iterator[Box]:
    """Random squares in a photo of `size` (width, height), in pixels: left, top, right, bottom.

    Their sides are spread evenly over the scales of the split. They lie anywhere across the short
    side, and near `centre` along the long one.
    """
    width, height = size
    short = min(size)
    low, high = HELD_OUT
    for scale, x, y in generator.random((count, 3)):
        if split == "val":
            scale = low + scale * (high - low)
        else:
            scale *= 1 - (high - low)
            scale += (high - low) if scale >= low else 0
        side = short * (LEAST_SIDE + scale * (1 - LEAST_SIDE))
        left = place(width, side, centre, short, x)
        top = place(height, side, 0.5, short, y)
        yield left, top, left + side, top + side


def place(length: int, side: float, centre: float, short: int, chance: float) -> float:
    """Where a square begins along one side of a photo of `length` pixels; `chance` is in [0, 1)."""
    free = length - side
    if length == short:
        return chance * free
    middle = centre * length - side / 2 + (2 * chance - 1) * SHIFT * short
    return min(max(middle, 0.0), free)


def label_map(photo: Image.Image, size: int) -> Image.Image:
    """Eight labels by colour and place, numbered from dark to light, of the photo's size."""
    from skimage.color import rgb2lab
    from skimage.filters import gaussian
    from sklearn.cluster import KMeans

    # About the crops' resolution: a larger one would only blur label borders and cost time.
    pixels = np.asarray(shrunk(photo, round(size / LEAST_SIDE)))
    height, width = pixels.shape[:2]
    colour = gaussian(rgb2lab(pixels), sigma=1, channel_axis=-1)
    position = np.moveaxis(np.mgrid[:height, :width], 0, -1) * (PLACE_WEIGHT / max(height, width))
    features = np.concatenate([colour, position], axis=-1).reshape(-1, 5)
    means = KMeans(NUM_LABELS, n_init=1, max_iter=50, random_state=0).fit(features)
    ranks = np.argsort(np.argsort(means.cluster_centers_[:, 0]))
    labels = ranks[means.labels_].reshape(height, width).astype(np.uint8)
    return Image.fromarray(labels).resize(photo.size, Resampling.NEAREST)


def cut(
    photo: Image.Image, labels: Image.Image, boxes: Iterable[Box], size: int
) -> Iterator[tuple[Image.Image, Image.Image]]:
    """The squares of a photo at `size` pixels, each with its label map."""
    for box in boxes:
        yield (
            photo.resize((size, size), Resampling.LANCZOS, box),
            labels.resize((size, size), Resampling.NEAREST, box),
        )


def save(crops: Iterator[tuple[Image.Image, Image.Image]], folder: Path, name: str) -> None:
    images, segmentations = folder / "images" / name, folder / "segmentations" / name
    for target in (images, segmentations):
        target.mkdir(parents=True, exist_ok=True)
    for number, (image, labels) in enumerate(crops):
        image.save(images / f"{number:04d}.png")
        labels.save(segmentations / f"{number:04d}.png")


if __name__ == "__main__":
    cli.run(main)
