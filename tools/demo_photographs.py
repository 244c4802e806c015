"""Cut the demo's images from the photographs that lie inside scikit-image and scikit-learn.

    python tools/demo_photographs.py --out DIR [--size 64] [--crops 250]

Makes {train,val}/images/<photo>/*.png and, with the same names, {train,val}/segmentations/. A photo
is a class. Training and validation crops come from the two sides of a cut through each photo, so
they share no pixels. Label maps: k-means over smoothed Lab colour and position, 8 labels per photo.
"""

import importlib.util
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from PIL.Image import Resampling

from taming_dist import cli
from taming_dist.errors import UserError
from taming_dist.formats.strict_json import write_json

PHOTOGRAPHS = {
    "astronaut": ("skimage", "data/astronaut.png"),
    "brick": ("skimage", "data/brick.png"),
    "cat": ("skimage", "data/chelsea.png"),
    "coffee": ("skimage", "data/coffee.png"),
    "coins": ("skimage", "data/coins.png"),
    "flower": ("sklearn", "datasets/images/flower.jpg"),
    "galaxies": ("skimage", "data/hubble_deep_field.jpg"),
    "motorcycle": ("skimage", "data/motorcycle_left.png"),
    "pagoda": ("sklearn", "datasets/images/china.jpg"),
    "retina": ("skimage", "data/retina.jpg"),
    "rocket": ("skimage", "data/rocket.jpg"),
    "tissue": ("skimage", "data/ihc.png"),
}
NUM_LABELS = 8
VAL_SHARE = 0.16  # 40 validation crops to 250 for training
# A crop spans a photo's short side divided by one of these: enough to be recognisable.
ZOOMS = (2.2, 3.0)
PLACE_WEIGHT = 30.0  # Lab units across the whole photo: keeps labels in one piece
DONE = "photographs.json"


@dataclass(frozen=True)
class Region:
    """One side of a photo with its label map, both [h, w], and the largest crop that fits."""

    photo: Image.Image
    labels: Image.Image
    short_side: int


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
    for number, name in enumerate(sorted(PHOTOGRAPHS)):
        for split, region in cut_in_two(load(name), args.size).items():
            seed = [number, 0 if split == "train" else 1]
            crops = draw_crops(region, args.size, num_crops[split], np.random.default_rng(seed))
            save(crops, args.out / split, name)
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


def load(name: str) -> Image.Image:
    """A photograph from the installed package that contains it."""
    package, file = PHOTOGRAPHS[name]
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"{package} is not installed: pip install -e '.[demo]'")
    path = Path(spec.submodule_search_locations[0], file)
    if not path.is_file():
        raise UserError(f"{path} is missing: reinstall {package} with pip install -e '.[demo]'")
    with Image.open(path) as image:
        return image.convert("RGB")


def cut_in_two(photo: Image.Image, size: int) -> dict[str, Region]:
    """Cut a photo across its longer side; both parts hold a crop of the largest scale."""
    # A resolution several times the crops' would only blur label borders and cost time.
    scale = ZOOMS[1] * size / min(photo.size)
    scaled = (round(photo.width * scale), round(photo.height * scale))
    labels = label_map(photo.resize(scaled, Resampling.LANCZOS))
    labels = labels.resize(photo.size, Resampling.NEAREST)
    width, height = photo.size
    short, long = min(photo.size), max(photo.size)
    border = long - max(round(0.3 * long), math.ceil(short / ZOOMS[0]))
    boxes = {"train": (0, 0, border, short), "val": (border, 0, long, short)}
    if height > width:
        boxes = {split: (top, left, low, right) for split, (left, top, right, low) in boxes.items()}
    # Cut before scaling, so that no filter reaches across the border.
    return {split: Region(photo.crop(box), labels.crop(box), short) for split, box in boxes.items()}


def label_map(photo: Image.Image) -> Image.Image:
    """Eight labels by colour and place, numbered from dark to light."""
    from skimage.color import rgb2lab
    from skimage.filters import gaussian
    from sklearn.cluster import KMeans

    pixels = np.asarray(photo)
    colour = gaussian(rgb2lab(pixels), sigma=2, channel_axis=-1)
    height, width = pixels.shape[:2]
    place = np.moveaxis(np.mgrid[:height, :width], 0, -1) * (PLACE_WEIGHT / max(height, width))
    features = np.concatenate([colour, place], axis=-1).reshape(-1, 5)
    means = KMeans(NUM_LABELS, n_init=1, max_iter=50, random_state=0).fit(features[::7])
    ranks = np.argsort(np.argsort(means.cluster_centers_[:, 0]))
    return Image.fromarray(ranks[means.predict(features)].reshape(height, width).astype(np.uint8))


def draw_crops(
    region: Region, size: int, count: int, generator: np.random.Generator
) -> Iterator[tuple[Image.Image, Image.Image]]:
    """Random squares of random scale, each with its label map."""
    for zoom, x, y in generator.random((count, 3)):
        side = region.short_side / (ZOOMS[0] + zoom * (ZOOMS[1] - ZOOMS[0]))
        left, top = x * (region.photo.width - side), y * (region.photo.height - side)
        box = (left, top, left + side, top + side)
        yield (
            region.photo.resize((size, size), Resampling.LANCZOS, box),
            region.labels.resize((size, size), Resampling.NEAREST, box),
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
