"""Make the manifest and tar index of existing WebDataset shards, in one pass over each.

    python tools/index_shards.py SHARDS...              # tar files, or folders of them
    python tools/index_shards.py URLS... --out DIR      # http(s)://, s3://, gs:// ...

The manifest and indexes of remote shards are written to DIR, which is then the shard spec; the
shards stay where they are. A folder with a broken shard gets no manifest.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from braceexpand import braceexpand

from taming_dist import cli
from taming_dist.cli import count
from taming_dist.errors import UserError
from taming_dist.formats import storage
from taming_dist.formats.files import writing
from taming_dist.formats.manifest import IMAGES_FORMAT, MANIFEST, Manifest, Shard, write_index
from taming_dist.formats.shards import IMAGE_EXTENSIONS, scan_at

Scanned = tuple[Shard, np.ndarray]


def main(argv: Sequence[str] | None = None) -> None:
    """Index the shards, folder by folder, and report every one that cannot be used."""
    parser = cli.Parser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "shards", nargs="+", help="tar files or folders of them; URLs, also with braces or, where "
        "a store lists its files, globs",
    )  # fmt: skip
    parser.add_argument("--out", type=Path, help="folder for the manifest and indexes of URLs")
    parser.add_argument("--workers", type=cli.COUNT, default=1, help="shards read in parallel")
    args = parser.parse_args(argv)
    unfit = 0
    for folder, locations in group(args.shards, args.out).items():
        with writing(folder):
            unfit += index_folder(folder, locations, args.workers)
    if unfit:
        raise UserError(
            f"{count(unfit, 'shard')} cannot be used, for the reasons above: fix, fetch again or "
            f"delete them, then rerun; folders with such shards got no manifest"
        )


def group(given: list[str], out: Path | None) -> dict[Path, list[str]]:
    """The given shards by the folder of their manifest."""
    folders: dict[Path, list[str]] = defaultdict(list)
    for name in given:
        if storage.is_url(name) != (out is not None):
            raise UserError(f"{storage.shown(name)}: --out DIR is for URLs only, which need it")
        for location in find_remote(name) if out else find_local(Path(name)):
            folders[out or Path(location).parent].append(location)
    for folder, locations in folders.items():
        check_names(folder, locations)
    return folders


def find_local(path: Path) -> list[str]:
    if not path.exists():
        raise UserError(f"{path}: there is no such file")
    paths = sorted(path.glob("*.tar")) if path.is_dir() else [path]
    if not paths:
        raise UserError(f"{path}: no tar files in this folder")
    return [str(shard) for shard in paths]


def find_remote(url: str) -> list[str]:
    storage.check_scheme(url)
    found: list[str] = []
    for location in braceexpand(url):
        is_glob = "*" in location
        if not is_glob and not storage.file_name(location).endswith(".tar"):
            location, is_glob = storage.beside(location, "*.tar"), True
        found += storage.matching(location) if is_glob else [location]
    if not found:
        raise UserError(f"{storage.shown(url)}: no tar files there")
    return found


def check_names(folder: Path, locations: list[str]) -> None:
    """Refuse two shards with the same name, as names are the keys of a manifest."""
    named: dict[str, str] = {}
    for location in locations:
        other = named.setdefault(storage.file_name(location), location)
        if other != location:
            raise UserError(
                f"{storage.shown(other)} and {storage.shown(location)} have the same name: index "
                f"them into two folders, and list both in the shard spec"
            )


def index_folder(folder: Path, locations: list[str], workers: int) -> int:
    """Scan shards and enter them in a folder's manifest; return how many cannot be used."""
    folder.mkdir(parents=True, exist_ok=True)
    known = Manifest.load(folder) if (folder / MANIFEST).exists() else None
    if known is not None and known.format != IMAGES_FORMAT:
        raise UserError(f"{folder} holds {known.format} shards, which need no index")
    found, unfit = [], 0
    for location, result in zip(locations, scan_all(locations, folder, workers), strict=True):
        try:
            shard, offsets = result()
        except UserError as error:
            print(error, flush=True)
            unfit += 1
            continue
        write_index(folder / shard.name, offsets)
        found.append(shard)
        print(describe(location, shard), flush=True)
    if not unfit:
        save(folder, known, found)
    return unfit


def scan_all(locations: list[str], folder: Path, workers: int) -> Iterator[Callable[[], Scanned]]:
    """Yield, for each shard in order, a function that returns its entry and offsets or raises."""
    if min(workers, len(locations)) == 1:
        yield from (partial(scan_at, location, folder) for location in locations)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        yield from [pool.submit(scan_at, location, folder).result for location in locations]


def describe(location: str, shard: Shard) -> str:
    line = f"{storage.shown(location)}: {count(shard.samples, 'sample')}"
    num_images = sum(shard.columns.get(extension, 0) for extension in IMAGE_EXTENSIONS)
    if num_images < shard.samples:
        line += f", at least {shard.samples - num_images} of them without an image"
    return line


def save(folder: Path, known: Manifest | None, found: list[Shard]) -> None:
    """Write the manifest: the shards found now, and earlier ones that still exist."""
    entries = {shard.name: shard for shard in (known.shards if known else ())}
    entries = {n: shard for n, shard in entries.items() if shard.url or (folder / n).exists()}
    entries |= {shard.name: shard for shard in found}
    shards = tuple(entries[name] for name in sorted(entries))
    Manifest(IMAGES_FORMAT, shards, known.classes if known else None).save(folder)
    samples = count(sum(shard.samples for shard in shards), "sample")
    print(f"{folder / MANIFEST}: {count(len(shards), 'shard')}, {samples}")


if __name__ == "__main__":
    cli.run(main)
