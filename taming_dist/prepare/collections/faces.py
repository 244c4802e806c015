"""CelebA-HQ, FFHQ, and both combined, following the lists of the original."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from taming_dist.prepare.collections.entry import Collection, Entry, LeftOut
from taming_dist.prepare.collections.lists import ImageList
from taming_dist.prepare.collections.splits import find, spellings


def faces(name: str, root: Path, split: str) -> ImageList:
    """The images in `root/<name>` listed by `root/<name><split>.txt`; arrays become PNG."""
    lists = [root / f"{name}{spelling}.txt" for spelling in spellings(split)]
    return ImageList(find(lists) or lists[0], root / name)


def celebahq(root: Path, split: str = "train") -> Collection:
    """See `faces`."""
    return faces("celebahq", root, split)


def ffhq(root: Path, split: str = "train") -> Collection:
    """See `faces`."""
    return faces("ffhq", root, split)


class FacesHQ(Collection):
    """CelebA-HQ and FFHQ combined; the class is the data set that an image comes from."""

    classes = ("celebahq", "ffhq")

    def __init__(self, root: Path, split: str = "train") -> None:
        super().__init__(str(root))
        self._parts = [faces(name, root, split) for name in self.classes]

    def __iter__(self) -> Iterator[Entry | LeftOut]:
        for cls, (name, part) in enumerate(zip(self.classes, self._parts, strict=True)):
            for entry in part:
                named = replace(entry, name=f"{name}/{entry.name}")
                yield replace(named, cls=cls) if isinstance(named, Entry) else named
