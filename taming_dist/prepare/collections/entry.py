"""The record that every collection of images yields for each image, however it is stored."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from taming_dist.errors import UserError
from taming_dist.formats.classes import class_fault
from taming_dist.formats.shards import IMAGE_EXTENSIONS

OTHER_FILE = "other file"  # the kind of a file whose name is not that of an image
HIDDEN = "hidden"  # the kind of a hidden file, or one of the system rather than the data
ARRAY = "npy"  # CelebA-HQ is distributed as arrays


@dataclass(frozen=True)
class Entry:
    """One image to be stored, and what belongs to it.

    `name`: unique in the data set, with the extension; the key is derived from it. `image`: a file
    or its bytes. `cls`: class id; `UserError` if it is out of range. `pairs`: files by column
    ("seg", "depth", "edges", "lr"). `facts`: the contents of `<key>.json`, whose `objects` have
    boxes as fractions of the image.
    """

    name: str
    image: Path | bytes
    cls: int | None = None
    pairs: Mapping[str, Path] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        fault = None if self.cls is None else class_fault(self.cls)
        if fault is not None:
            raise UserError(
                f"{self.name}: {fault}: correct its label, or make shards without classes "
                f"(--labels none)"
            )


@dataclass(frozen=True)
class LeftOut:
    """A file that is left out of the shards: its name, the kind of fault, and the reason."""

    name: str
    kind: str
    reason: str


class Collection(ABC):
    """Images and what belongs to them, in any order: names alone decide where each is stored.

    `where`: the source as given by the user, for messages. `classes`: class names by id, or None.
    `details`: facts for the manifest. `label_shift` is added to label maps, modulo 256.
    """

    classes: tuple[str, ...] | None = None
    label_shift: int = 0

    def __init__(self, where: str) -> None:
        self.where = where
        self.details: dict[str, Any] = {}

    @abstractmethod
    def __iter__(self) -> Iterator[Entry | LeftOut]: ...


def is_image(name: str) -> bool:
    """Whether a file has the extension of an image."""
    stem, _, extension = name.rpartition("/")[2].lower().rpartition(".")
    return bool(stem) and (extension in IMAGE_EXTENSIONS or extension == ARRAY)


# What desktops, archives, network drives and notebooks leave behind, in lower case.
SYSTEM_NAMES = frozenset((
    "__macosx", "@eadir", "@recycle", "@recently-snapshot", "#recycle", "#snapshot",
    "$recycle.bin", "system volume information", "lost+found", "__pycache__",
    "thumbs.db", "desktop.ini",
))  # fmt: skip


def is_hidden(name: str) -> bool:
    """Whether the last part of a path is that of a hidden or system file or folder."""
    last = last_name(name)
    return last.startswith(".") or last.lower() in SYSTEM_NAMES


def last_name(name: str) -> str:
    """The last part of a relative path, with its trailing slash if there is one."""
    return name.rstrip("/").rpartition("/")[2]


def hidden(name: str) -> LeftOut:
    """The record of a hidden file or, if the name has a trailing slash, folder."""
    if name.endswith("/"):
        return LeftOut(name, HIDDEN, "a hidden or system folder: rename it to use its contents")
    return LeftOut(name, HIDDEN, "a hidden file: rename it to use it")


def no_image(name: str) -> LeftOut:
    """The record of a file that is not an image."""
    return LeftOut(name, OTHER_FILE, "not a jpg, png, webp or npy file")
