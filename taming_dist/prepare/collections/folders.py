"""Folders of images, flat or with a folder per class, and folders of the images' maps."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path, PurePosixPath

from taming_dist.data.texts import CAPTION
from taming_dist.errors import UserError
from taming_dist.formats.names import escape, natural_order
from taming_dist.prepare.collections.entry import (
    Collection,
    Entry,
    LeftOut,
    hidden,
    is_hidden,
    is_image,
    no_image,
)


class ImageFolder(Collection):
    """Every image below a folder except hidden ones; names are paths relative to the folder."""

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder))
        self.folder = require_folder(folder)

    def __iter__(self) -> Iterator[Entry | LeftOut]:
        for name in filter(self._wanted, walk_files(self.folder)):
            if not is_image(name):
                yield hidden(name) if name.endswith("/") else no_image(name)
            else:
                yield hidden(name) if is_hidden(name) else self._entry(name)

    def _wanted(self, name: str) -> bool:
        return True

    def _entry(self, name: str) -> Entry:
        return Entry(name, self.folder / name)


class ClassFolders(ImageFolder):
    """Images in one folder per class; ids number the folder names in natural order.

    The classes are the first-level folders that hold any file; hidden ones do not count.

    Raises:
        UserError: an image outside of all class folders.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        names = class_folders(folder)
        self.classes = tuple(map(escape, names))
        self._ids = {name: number for number, name in enumerate(names)}

    def _entry(self, name: str) -> Entry:
        first, slash, _ = name.partition("/")
        if not slash or first not in self._ids:
            raise UserError(
                f"{self.folder / name} is not in a class folder: move it into one, or leave "
                f"--labels folders out"
            )
        return Entry(name, self.folder / name, cls=self._ids[first])


class Paired(Collection):
    """The images of `collection`, each with the files of the same name in other folders.

    `folders` by column. Label maps, depth maps and edges are `.png`; a low-resolution image has
    the image's own name, or `.png`; captions are `.txt`. An image whose file is missing is left
    out.
    """

    def __init__(self, collection: Collection, folders: Mapping[str, Path]) -> None:
        super().__init__(collection.where)
        self.classes, self.label_shift = collection.classes, collection.label_shift
        self.details = collection.details
        self._collection = collection
        self._folders = {column: require_folder(folder) for column, folder in folders.items()}

    def __iter__(self) -> Iterator[Entry | LeftOut]:
        for entry in self._collection:
            yield self._pair(entry) if isinstance(entry, Entry) else entry

    def _pair(self, entry: Entry) -> Entry | LeftOut:
        pairs = dict(entry.pairs)
        for column, folder in self._folders.items():
            extension = ".txt" if column == CAPTION else ".png"
            names = [PurePosixPath(entry.name).with_suffix(extension).as_posix()]
            if column == "lr":
                names.insert(0, entry.name)
            found = next((folder / name for name in names if (folder / name).is_file()), None)
            if found is None:
                return LeftOut(entry.name, "pair", f"{folder / names[-1]} is missing")
            pairs[column] = found
        return replace(entry, pairs=pairs)


def require_folder(folder: Path) -> Path:
    """Return the folder; `UserError` if it does not exist."""
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder")
    return folder


def require_file(path: Path) -> Path:
    """Return the file; `UserError` if it does not exist."""
    if not path.is_file():
        raise UserError(f"{path}: there is no such file")
    return path


def class_folders(folder: Path) -> tuple[str, ...]:
    """The names of the folders in `folder` that hold any file, in natural order."""
    with os.scandir(folder) as entries:
        names = [e.name for e in entries if _is_folder(e) and not is_hidden(e.name)]
    return tuple(sorted((n for n in names if _holds_files(folder / n)), key=natural_order))


def _holds_files(folder: Path) -> bool:
    return any(not is_hidden(name) for name in walk_files(folder))


def walk_files(folder: Path) -> Iterator[str]:
    """Yield every file below a folder as a relative name, in any order; links are followed.

    A hidden folder is not entered: its name is yielded with a trailing slash. No directory is held
    as a list.

    Raises:
        UserError: a folder links to one of its parents.
    """
    pending = [("", frozenset({_identity(folder)}))]
    while pending:
        prefix, above = pending.pop()
        with os.scandir(folder / prefix) as entries:
            for entry in entries:
                if not _is_folder(entry):
                    yield prefix + entry.name
                    continue
                if is_hidden(entry.name):
                    yield f"{prefix}{entry.name}/"
                    continue
                identity = _identity(Path(entry.path))
                if identity in above:
                    raise UserError(f"{entry.path} links to a folder above itself: remove the link")
                pending.append((f"{prefix}{entry.name}/", above | {identity}))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    # `entry.is_dir` would raise for a link that points to itself.
    return os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir()


def _identity(folder: Path) -> tuple[int, int]:
    stat = folder.stat()
    return stat.st_dev, stat.st_ino
