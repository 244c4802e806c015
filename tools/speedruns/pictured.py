"""One picture of what several tokenizers make of the same images."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from taming_dist.atomic import replacing
from taming_dist.data.images import Preprocess
from taming_dist.data.reader import Reader, Reading
from taming_dist.evaluation.pictures import Pictures
from taming_dist.formats.manifest import resolve
from taming_dist.generation.pictures import image_grid, to_uint8
from taming_dist.models.modalities import RGB
from taming_dist.models.vqgan import VQGAN

IMAGES, BATCH = 10, 16
INCHES, DPI = 1.0, 100  # of an image


def draw(exports: Mapping[str, Path], shards: Path, file: Path) -> None:
    """Write images, spread over the shards, above the reconstructions of the exports, a row for
    each name."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    models = {name: VQGAN.from_pretrained(export) for name, export in exports.items()}
    images = chosen_images(shards, next(iter(models.values())).config.resolution)
    rows = {"images": images} | {name: made(model, images) for name, model in models.items()}
    size = (IMAGES * INCHES + 1, len(rows) * INCHES)
    figure, axes = pyplot.subplots(len(rows), 1, squeeze=False, figsize=size, layout="constrained")
    for axis, (name, pictures) in zip(axes.flat, rows.items(), strict=True):
        axis.imshow(image_grid(pictures, IMAGES).permute(1, 2, 0).numpy())
        axis.set_ylabel(name, rotation=0, ha="right", va="center")
        axis.set(xticks=[], yticks=[], frame_on=False)
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as written:
        figure.savefig(written, dpi=DPI, format="png")
    pyplot.close(figure)


def chosen_images(shards: Path, size: int) -> Tensor:
    """Some images uint8 [b, 3, size, size], evenly spread."""
    dataset = resolve(str(shards))
    chosen = Pictures(IMAGES, dataset.num_samples)
    reading = Reading(Preprocess(size), BATCH, columns=[RGB.column], with_classes=False)
    for batch in Reader(dataset, reading).epoch_batches():
        pictures = batch.columns[RGB.column]
        chosen.add(pictures, pictures, batch.ids)
    return torch.stack([torch.from_numpy(chosen.pairs[n][0]) for n in sorted(chosen.pairs)])


@torch.no_grad()
def made(model: VQGAN, images: Tensor) -> Tensor:
    """Reconstructions uint8 [b, 3, h, w] of images of the same shape."""
    inputs = model.config.modality.tensor(images)
    return to_uint8(model.config.modality.picture(model.decode_codes(model.encode(inputs))))
