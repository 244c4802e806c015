"""Make manifest and tar index for WebDataset shards that others wrote, in one pass over each.

    python tools/index_shards.py SHARDS...        # tar files, or folders of them

A folder whose shards are not all whole gets no manifest.
"""

import argparse
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from taming_dist import cli
from taming_dist.data.manifest import IMAGES_FORMAT, MANIFEST, Manifest, Shard, write_index
from taming_dist.data.shards import IMAGE_EXTENSIONS, scan
from taming_dist.errors import UserError


def main(argv: Sequence[str] | None = None) -> None:
    """Index the shards, folder by folder, and report every damaged one."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("shards", type=Path, nargs="+", help="tar files, or folders of them")
    damaged = []
    for folder, paths in group(parser.parse_args(argv).shards).items():
        damaged += index_folder(folder, paths)
    if damaged:
        raise UserError(
            f"{len(damaged)} damaged shards (listed above): fetch them again or delete them, then "
            f"rerun; their folders got no manifest"
        )


def group(given: list[Path]) -> dict[Path, list[Path]]:
    """The tar files that were named, by folder."""
    folders: dict[Path, list[Path]] = defaultdict(list)
    for path in given:
        if not path.exists():
            raise UserError(f"{path}: there is no such file")
        paths = sorted(path.glob("*.tar")) if path.is_dir() else [path]
        if not paths:
            raise UserError(f"{path}: no tar files in this folder")
        for shard in paths:
            folders[shard.parent].append(shard)
    return folders


def index_folder(folder: Path, paths: list[Path]) -> list[Path]:
    """Scan shards and enter them in their folder's manifest; returns the damaged ones."""
    known = Manifest.load(folder) if (folder / MANIFEST).exists() else None
    if known is not None and known.format != IMAGES_FORMAT:
        raise UserError(f"{folder} holds {known.format} shards, which need no index")
    found, damaged = [], []
    for path in paths:
        try:
            shard, offsets = scan(path)
        except UserError as error:
            print(error)
            damaged.append(path)
            continue
        write_index(path, offsets)
        found.append(shard)
        print(describe(path, shard), flush=True)
    if not damaged:
        save(folder, known, found)
    return damaged


def describe(path: Path, shard: Shard) -> str:
    line = f"{path}: {shard.samples} samples"
    num_images = sum(shard.columns.get(extension, 0) for extension in IMAGE_EXTENSIONS)
    if num_images < shard.samples:
        line += f", at least {shard.samples - num_images} of them without an image"
    return line


def save(folder: Path, known: Manifest | None, found: list[Shard]) -> None:
    """Write the manifest: what was found now, and what it held before and still exists."""
    entries = {shard.name: shard for shard in (known.shards if known else ())}
    entries = {name: shard for name, shard in entries.items() if (folder / name).exists()}
    entries |= {shard.name: shard for shard in found}
    shards = tuple(entries[name] for name in sorted(entries))
    Manifest(IMAGES_FORMAT, shards, known.classes if known else None).save(folder)
    print(f"{folder / MANIFEST}: {len(shards)} shards, {sum(s.samples for s in shards)} samples")


if __name__ == "__main__":
    cli.run(main)
