"""The data sets of the original by name, each in the folder layout in which it is distributed."""

from collections.abc import Callable, Sequence
from pathlib import Path

from taming_dist.errors import UserError
from taming_dist.prepare.collections.entry import Collection
from taming_dist.prepare.collections.faces import FacesHQ, celebahq, ffhq
from taming_dist.prepare.collections.folders import require_folder
from taming_dist.prepare.collections.imagenet import ImageNet
from taming_dist.prepare.collections.objects import Coco, OpenImages
from taming_dist.prepare.collections.segmented import ade20k, sflckr

LAYOUTS: dict[str, Callable[..., Collection]] = {
    "imagenet": ImageNet,
    "sflckr": sflckr,
    "ade20k": ade20k,
    "coco": Coco,
    "openimages": OpenImages,
    "celebahq": celebahq,
    "ffhq": ffhq,
    "faceshq": FacesHQ,
}


def open_layout(words: Sequence[str]) -> Collection:
    """Open a collection from a layout's name, its root folder and perhaps a split."""
    if words[0] not in LAYOUTS:
        raise UserError(f"--layout {words[0]}: choose one of {', '.join(LAYOUTS)}")
    if len(words) not in (2, 3):
        raise UserError(f"--layout {words[0]}: give its folder and, optionally, a split")
    return LAYOUTS[words[0]](require_folder(Path(words[1])), *words[2:])
