"""Check image or code shards against their manifest: counts, sizes, hashes, indexes.

python tools/verify_shards.py DIR        # or the URL of a folder
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from taming_dist import cli
from taming_dist.cli import count
from taming_dist.errors import UserError
from taming_dist.formats import storage
from taming_dist.formats.code_shards import SHARED_FACTS, CodeShard
from taming_dist.formats.manifest import CODES_FORMATS, IDX, Manifest, Shard, read_index
from taming_dist.formats.shards import measure, scan
from taming_dist.formats.storage import shown


def main(argv: Sequence[str] | None = None) -> None:
    """Read all of every shard of a folder and list what is wrong."""
    parser = cli.Parser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", metavar="DIR", help="folder with a manifest, or its URL")
    folder = parser.parse_args(argv).folder
    storage.check_scheme(folder)
    manifest = Manifest.load(folder)
    name, num_wrong = shown(folder), 0
    for shard in manifest.shards:
        try:
            check(folder, shard, manifest)
        except UserError as error:
            num_wrong += 1
            print(error, flush=True)
    if num_wrong:
        shards = count(len(manifest.shards), "shard")
        raise UserError(f"{num_wrong} of {shards} in {name} cannot be used, for the reasons above")
    samples = count(sum(shard.samples for shard in manifest.shards), "sample")
    print(f"{name}: {count(len(manifest.shards), 'shard')}, {samples}, all as the manifest says")


def check(folder: str, shard: Shard, manifest: Manifest) -> None:
    """Raise `UserError` unless a shard matches its manifest."""
    location = shard.url or storage.beside(folder, shard.name)
    size = storage.open_source(location).size()
    if size != shard.bytes:
        raise UserError(f"{shown(location)} has {size} bytes, its manifest says {shard.bytes}")
    with storage.local_copy(location) as path:
        digest = measure(path)[1]
        if digest != shard.xxh3_128:
            raise UserError(
                f"{shown(location)} has contents that differ from its manifest (xxh3 {digest})"
            )
        if manifest.format in CODES_FORMATS:
            check_codes(path, location, shard, manifest.details)
        else:
            check_images(path, location, shard, storage.beside(folder, shard.name + IDX))


def check_images(path: Path, location: str, shard: Shard, index: str) -> None:
    found, offsets = scan(path, location)
    if replace(found, name=shard.name, url=shard.url) != shard:
        raise UserError(
            f"{shown(location)} has {found.samples} samples with {found.columns}, "
            f"its manifest says {shard.samples} with {shard.columns}"
        )
    if not (read_index(location, shard, index) == offsets).all():
        raise UserError(
            f"{shown(index)} is wrong; run: python tools/index_shards.py {shown(location)}"
        )


def check_codes(path: Path, location: str, shard: Shard, details: Mapping[str, Any]) -> None:
    contents = CodeShard.open(path)
    if len(contents.codes) != shard.samples:
        raise UserError(
            f"{shown(location)} has {len(contents.codes)} rows, its manifest says {shard.samples}"
        )
    fault = contents.verify()
    if fault is not None:
        raise UserError(f"{shown(location)}: {fault}")
    for fact in (*SHARED_FACTS, "preprocessing"):
        if contents.facts.get(fact) != details.get(fact):
            raise UserError(
                f"{shown(location)} has the {fact} {contents.facts.get(fact)}, its manifest says "
                f"{details.get(fact)}: delete the manifest and run tools/tokenize_dataset.py again"
            )


if __name__ == "__main__":
    cli.run(main)
