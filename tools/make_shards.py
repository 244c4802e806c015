"""Make WebDataset shards, with manifest and tar index, from a folder of images.

    python tools/make_shards.py --images DIR --out DIR [--labels folders] [--segmentations DIR]

Images (jpg, jpeg, png, webp) go in as they are, in a shuffled order, unless --short-side scales
larger ones down. Every file that is left out is listed with the reason and counted.
"""

import argparse
import hashlib
import io
import json
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from taming_dist import cli
from taming_dist.data.faults import BrokenData
from taming_dist.data.images import decode, decode_labels, resize_short_side
from taming_dist.data.manifest import MANIFEST, Manifest
from taming_dist.data.order import WRITING, permutation
from taming_dist.data.shards import IMAGE_EXTENSIONS, ShardWriter
from taming_dist.errors import UserError

MAX_KEY = 80  # a USTAR name has 100 bytes, extension included
REPORT_EVERY_S = 5.0


@dataclass(frozen=True)
class Source:
    """One image to be stored: its file, its name below the image folder, what belongs to it."""

    path: Path
    name: str
    cls: int | None
    segmentation: Path | None


def main(argv: Sequence[str] | None = None) -> None:
    """Make the shards, unless they are there already; print a summary."""
    args = parse(argv)
    started = time.monotonic()
    files = list_files(args.images)
    images = [name for name in files if is_image(name)]
    if not images:
        raise UserError(f"--images {args.images}: no jpg, png or webp file below it")
    classes = classes_of(files, images, args)
    class_ids = {name: number for number, name in enumerate(classes or ())}
    sources = [make_source(name, args, class_ids) for name in images]
    skipped = {name: "not a jpg, png or webp file" for name in files if not is_image(name)}
    inputs = digest_of(sources, args)
    if is_done(args.out, inputs):
        return
    details = {"inputs": inputs, "skipped": skipped}
    writer = ShardWriter(args.out, args.prefix, args.shard_samples, classes, details)
    with writer:
        num_written = write_all(sources, writer, skipped, args)
        if not num_written:
            raise UserError(f"--images {args.images}: none of {len(sources)} images can be read")
    for name, reason in skipped.items():
        print(f"left out: {name}: {reason}")
    seconds = time.monotonic() - started
    print(
        f"{num_written} images in {args.out} ({num_written / seconds:.0f} images/s); "
        f"{len(skipped)} files left out"
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=Path, required=True, help="folder of images")
    parser.add_argument("--out", type=Path, required=True, help="folder of the shards")
    parser.add_argument(
        "--labels", choices=["folders"], help="folders: class = first folder, by sorted name"
    )
    parser.add_argument(
        "--segmentations", type=Path, help="label maps: same names below this folder, .png"
    )
    parser.add_argument("--short-side", type=int, help="scale larger images down to this")
    parser.add_argument("--prefix", default="train", help="shards are <prefix>-000000.tar ...")
    parser.add_argument("--shard-samples", type=int, default=1024, help="images per shard")
    parser.add_argument("--quality", type=int, default=95, help="JPEG quality of scaled images")
    args = parser.parse_args(argv)
    for name in ("short_side", "shard_samples", "quality"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')} is {value} but must be at least 1")
    if not re.fullmatch(r"[\w-]+", args.prefix):
        raise UserError(f"--prefix is {args.prefix!r}: use letters, digits, _ and - only")
    return args


def list_files(folder: Path) -> list[str]:
    """All files below a folder as sorted relative names; folders that cannot be read are errors."""
    if not folder.is_dir():
        raise UserError(f"--images {folder}: there is no such folder")

    def fail(error: OSError) -> None:
        raise error

    found = []
    for root, _, names in os.walk(folder, onerror=fail, followlinks=True):
        found += [Path(root, name).relative_to(folder).as_posix() for name in names]
    return sorted(found)


def is_image(name: str) -> bool:
    return Path(name).suffix.lower().removeprefix(".") in IMAGE_EXTENSIONS


def classes_of(
    files: list[str], images: list[str], args: argparse.Namespace
) -> tuple[str, ...] | None:
    """The class names in the order of their ids: the folders that hold any file."""
    if args.labels is None:
        return None
    loose = [name for name in images if "/" not in name]
    if loose:
        raise UserError(f"--labels folders: {args.images / loose[0]} lies in no class folder")
    return tuple(sorted({name.partition("/")[0] for name in files if "/" in name}))


def make_source(name: str, args: argparse.Namespace, class_ids: dict[str, int]) -> Source:
    cls = class_ids[name.partition("/")[0]] if class_ids else None
    segmentation = None
    if args.segmentations is not None:
        segmentation = args.segmentations / Path(name).with_suffix(".png")
    return Source(args.images / name, name, cls, segmentation)


def digest_of(sources: list[Source], args: argparse.Namespace) -> str:
    """What the shards depend on: names, sizes and times of the files, and the settings."""
    facts: list[object] = [
        args.labels, args.short_side, args.shard_samples, args.prefix, args.quality
    ]  # fmt: skip
    for source in sources:
        for path in (source.path, source.segmentation):
            if path is not None and path.exists():
                stat = path.stat()
                facts.append([source.name, stat.st_size, stat.st_mtime_ns])
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def is_done(out: Path, inputs: str) -> bool:
    """Whether the shards are there already; `UserError` if others are."""
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file: give a folder")
    if not (out / MANIFEST).exists():
        return False
    manifest = Manifest.load(out)
    if manifest.details.get("inputs") != inputs:
        raise UserError(
            f"--out {out} holds shards of other images or settings: delete it or choose another"
        )
    num_images = sum(shard.samples for shard in manifest.shards)
    print(
        f"{out} is complete: {num_images} images, {len(manifest.details['skipped'])} files left "
        f"out; nothing to do"
    )
    return True


def write_all(
    sources: list[Source], writer: ShardWriter, skipped: dict[str, str], args: argparse.Namespace
) -> int:
    """Write every image that can be read, note the others; returns how many were written."""
    num_written, reported = 0, time.monotonic()
    keys = unique_keys([source.name for source in sources])
    # Shuffled once, so that no shard holds a single class.
    for done, index in enumerate(permutation(0, WRITING, count=len(sources)).tolist()):
        try:
            files = make_sample(sources[index], args)
        except BrokenData as error:
            skipped[sources[index].name] = str(error)
            continue
        writer.write(keys[index], files)
        num_written += 1
        if time.monotonic() - reported > REPORT_EVERY_S:
            reported = time.monotonic()
            print(f"{done + 1} of {len(sources)} images", flush=True)
    return num_written


def unique_keys(names: list[str]) -> list[str]:
    """A key for each image, its own name where the tar format allows that."""
    keys, taken = [], set()
    for number, name in enumerate(names):
        key = re.sub(r"[^A-Za-z0-9_/-]", "_", name.rpartition(".")[0])
        if len(key) > MAX_KEY or key in taken:
            key = f"{key[-MAX_KEY + 10 :].replace('/', '_')}_{number:08d}"
        taken.add(key)
        keys.append(key)
    return keys


def make_sample(source: Source, args: argparse.Namespace) -> dict[str, bytes]:
    """The files of a sample by extension; `BrokenData` if one cannot be read."""
    data = read(source.path)
    pixels = decode(data)
    extension = source.path.suffix.lower().removeprefix(".")
    is_scaled = args.short_side is not None and min(pixels.shape[:2]) > args.short_side
    if is_scaled:
        data, extension = (
            encode_jpeg(resize_short_side(pixels, args.short_side), args.quality),
            "jpg",
        )
    files = {extension: data}
    if source.segmentation is not None:
        labels_data = read(source.segmentation)
        labels = decode_labels(labels_data)
        if labels.shape != pixels.shape[:2]:
            raise BrokenData(f"its label map has another size, {labels.shape}")
        if is_scaled:
            labels_data = encode_png(
                resize_short_side(labels, args.short_side, Image.Resampling.NEAREST)
            )
        files["seg.png"] = labels_data
    if source.cls is not None:
        files["cls"] = str(source.cls).encode()
    return files


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise BrokenData(f"{path} is missing") from error


def encode_jpeg(pixels: np.ndarray, quality: int) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "JPEG", quality=quality)
    return out.getvalue()


def encode_png(labels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(labels).save(out, "PNG")
    return out.getvalue()


if __name__ == "__main__":
    cli.run(main)
