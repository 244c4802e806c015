"""ImageNet (ILSVRC 2012): a folder per synset, or one folder with a list of synsets.

Class ids number the sorted synsets, as in the original and everywhere else.
"""

import re
from itertools import chain
from pathlib import Path

from taming_dist.errors import UserError
from taming_dist.prepare.collections.entry import Entry
from taming_dist.prepare.collections.folders import ImageFolder, class_folders
from taming_dist.prepare.collections.splits import SPELLINGS, find, spellings

SYNSET = re.compile(r"n\d{8}")
# Lists with the synsets of images in a flat folder: the original's, Kaggle's, tiny ImageNet's.
TRUTHS = ("validation_synset.txt", "LOC_val_solution.csv", "val_annotations.txt")
NAMES = ("LOC_synset_mapping.txt", "synset_words.txt", "synset_human.txt", "words.txt")
# A CMYK PNG with the extension JPEG; the original leaves it out as well.
PASSED_OVER = "n06596364_9591.JPEG"


class ImageNet(ImageFolder):
    """`root/<split>/`, `root/data/` (the original's cache) or `root/` with the images.

    Classes are the folders of `root/train` if it exists, so that both splits agree.
    """

    def __init__(self, root: Path, split: str = "train") -> None:
        places = [root / name for name in (*spellings(split), "data")]
        is_split = any((root / name).is_dir() for name in chain(*SPELLINGS))
        whole = places[0] if is_split else root
        super().__init__(next((place for place in places if place.is_dir()), whole))
        truth = find([*(self.folder / name for name in TRUTHS), *(root / name for name in TRUTHS)])
        self._truth = _read_truth(truth) if truth is not None else {}
        own = [name for name in class_folders(self.folder) if SYNSET.fullmatch(name)]
        train = root / "train"
        if train.is_dir():
            self.classes = tuple(name for name in class_folders(train) if SYNSET.fullmatch(name))
        else:
            self.classes = tuple(own or sorted(set(self._truth.values())))
        if not self.classes:
            raise UserError(
                f"{self.folder} has no synset folders (n01440764 ...), and {root} has no "
                f"{' or '.join(TRUTHS)}"
            )
        self._ids = {synset: number for number, synset in enumerate(self.classes)}
        names = find([root / name for name in NAMES])
        if names is not None:
            texts = _read_names(names)
            self.details["class_names"] = [texts.get(synset, synset) for synset in self.classes]

    def _wanted(self, name: str) -> bool:
        return not name.endswith(PASSED_OVER)

    def _entry(self, name: str) -> Entry:
        folder, _, base = name.rpartition("/")
        first = folder.partition("/")[0]
        synset = first if SYNSET.fullmatch(first) else self._truth.get(base.partition(".")[0])
        if synset not in self._ids:
            raise UserError(
                f"{self.folder / name}: its synset ({synset or 'unknown'}) is not one of the "
                f"{len(self._ids)} classes"
            )
        return Entry(name, self.folder / name, self._ids[synset])


def _read_truth(path: Path) -> dict[str, str]:
    """The synset of each image by its name without the extension."""
    found = {}
    for line in path.read_text().splitlines():
        name, _, rest = re.sub(r"[,\t]", " ", line).partition(" ")
        synset = SYNSET.search(rest)
        if synset is not None:
            found[name.partition(".")[0]] = synset[0]
    return found


def _read_names(path: Path) -> dict[str, str]:
    """The name of each synset."""
    text = path.read_text(encoding="utf-8", errors="backslashreplace")
    lines = (line.split(maxsplit=1) for line in text.splitlines())
    return {parts[0]: parts[1].strip() for parts in lines if len(parts) == 2}
