"""Photographs with label maps: S-FLCKR (182 classes) and ADE20k (151 classes, and scenes)."""

from pathlib import Path

from taming_dist.errors import UserError
from taming_dist.formats.classes import number_names
from taming_dist.formats.names import escape
from taming_dist.prepare.collections.entry import Collection, Entry
from taming_dist.prepare.collections.folders import (
    ImageFolder,
    Paired,
    require_file,
    require_folder,
)
from taming_dist.prepare.collections.lists import ImageList
from taming_dist.prepare.collections.splits import find, spellings

SCENES = "sceneCategories.txt"


def sflckr(root: Path, split: str | None = None) -> Collection:
    """`root/sflckr_images` and `root/sflckr_segmentations`, or without the prefix.

    With a split, only the images listed by `root/sflckr_<split>.txt`.
    """
    images, maps = (
        require_folder(find([root / f"sflckr_{name}"]) or root / name)
        for name in ("images", "segmentations")
    )
    if split is None:
        return Paired(ImageFolder(images), {"seg": maps})
    return Paired(ImageList(root / f"sflckr_{split}.txt", images), {"seg": maps})


class Ade20k(ImageFolder):
    """`root/images/<split>`; the class is the scene given by `root/sceneCategories.txt`."""

    def __init__(self, root: Path, split: str) -> None:
        super().__init__(root / "images" / split)
        lines = [line.split() for line in require_file(root / SCENES).read_text().splitlines()]
        self._scenes = {parts[0]: parts[1] for parts in lines if len(parts) == 2}
        self._ids = number_names(self._scenes.values())
        self.classes = tuple(map(escape, self._ids))

    def _entry(self, name: str) -> Entry:
        scene = self._scenes.get(Path(name).stem)
        if scene is None:
            raise UserError(f"{SCENES} has no scene for {self.folder / name}")
        return Entry(name, self.folder / name, self._ids[scene])


def ade20k(root: Path, split: str = "training") -> Collection:
    """A split of ADE20k, with the label maps below `root/annotations/<split>`."""
    names = spellings(split)
    name = next((name for name in names if (root / "images" / name).is_dir()), split)
    return Paired(Ade20k(root, name), {"seg": root / "annotations" / name})
