"""Check shards against their manifest: counts, sizes, hashes, indexes; of images and of codes.

python tools/verify_shards.py DIR
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from taming_dist import cli
from taming_dist.data.codes import CodeShard
from taming_dist.data.manifest import CODES_FORMAT, Manifest, Shard, read_index
from taming_dist.data.shards import measure, scan
from taming_dist.errors import UserError


def main(argv: Sequence[str] | None = None) -> None:
    """Read every shard of a folder whole and list what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, metavar="DIR", help="folder with a manifest")
    folder = parser.parse_args(argv).folder
    manifest = Manifest.load(folder)
    check = check_codes if manifest.format == CODES_FORMAT else check_images
    num_wrong = 0
    for shard in manifest.shards:
        try:
            check(folder / shard.name, shard)
        except UserError as error:
            num_wrong += 1
            print(error, flush=True)
    if num_wrong:
        raise UserError(f"{num_wrong} of {len(manifest.shards)} shards in {folder} are wrong")
    samples = sum(shard.samples for shard in manifest.shards)
    print(f"{folder}: {len(manifest.shards)} shards, {samples} samples, all as the manifest says")


def check_bytes(path: Path, shard: Shard) -> None:
    """Raise `UserError` unless the file is there with the manifest's size and hash."""
    if not path.is_file():
        raise UserError(f"{path} is missing")
    size, digest = measure(path)
    if size != shard.bytes:
        raise UserError(f"{path} has {size} bytes, its manifest says {shard.bytes}")
    if digest != shard.xxh3_128:
        raise UserError(f"{path} has other contents than its manifest says (xxh3 {digest})")


def check_images(path: Path, shard: Shard) -> None:
    check_bytes(path, shard)
    found, offsets = scan(path)
    if found != shard:
        raise UserError(f"{path} has {found.samples} samples, its manifest says {shard.samples}")
    if not (read_index(path, shard.samples) == offsets).all():
        raise UserError(f"{path}.idx is wrong; run: python tools/index_shards.py {path}")


def check_codes(path: Path, shard: Shard) -> None:
    check_bytes(path, shard)
    contents = CodeShard.open(path)
    if len(contents.codes) != shard.samples:
        raise UserError(f"{path} has {len(contents.codes)} rows, its manifest says {shard.samples}")
    fault = contents.verify()
    if fault is not None:
        raise UserError(f"{path}: {fault}")


if __name__ == "__main__":
    cli.run(main)
