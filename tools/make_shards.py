"""Make WebDataset shards, with manifest and tar index, from images in folders, lists or tables.

    python tools/make_shards.py --images DIR --out DIR [--labels folders] [--segmentations DIR]
    python tools/make_shards.py --list FILE.txt|.csv|.tsv|.jsonl [--root DIR] --out DIR
    python tools/make_shards.py --layout imagenet DIR [SPLIT] --out DIR      # coco, ade20k, ...
    python tools/make_shards.py --parquet FILES --out DIR

Images are stored byte for byte unless they have to be changed (--short-side), in an order that
mixes classes. Every file that is left out is listed with the reason. The same command resumes an
interrupted run. See docs/making-shards.md.
"""

import argparse
import json
import os
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from itertools import chain
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from taming_dist import cli
from taming_dist.atomic import replacing
from taming_dist.cli import count
from taming_dist.errors import UserError
from taming_dist.formats.faults import SKIP, USE
from taming_dist.formats.files import writing
from taming_dist.formats.manifest import IMAGES_FORMAT, MANIFEST, Manifest
from taming_dist.formats.names import printable
from taming_dist.formats.strict_json import json_safe
from taming_dist.prepare.collections.entry import HIDDEN, Collection, last_name
from taming_dist.prepare.collections.folders import ClassFolders, ImageFolder, Paired
from taming_dist.prepare.collections.layouts import LAYOUTS, open_layout
from taming_dist.prepare.collections.lists import ImageList
from taming_dist.prepare.collections.parquet import ParquetTables
from taming_dist.prepare.making.catalogue import PLAN, Catalogue, digest_of, forget, list_images
from taming_dist.prepare.making.derived import require_canny
from taming_dist.prepare.making.maker import (
    Job,
    Lock,
    Report,
    ShardMaker,
    Split,
    cut,
    locking,
    run,
    split_by_key,
)
from taming_dist.prepare.making.samples import Recipe

UNFINISHED, LOCK, LEFT_OUT = "unfinished", "unfinished.lock", "left_out.jsonl"
REPORT_EVERY_S = 5.0
PRINTED_FILES = 20
LEAST_SHARDS_IN_PARALLEL = 4  # with fewer, starting workers takes longer than it saves
CANNY = "canny"
PAIR_COLUMNS = {
    "segmentations": "seg",
    "depth": "depth",
    "edges": "edges",
    "low-resolution": "lr",
    "captions": "txt",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Make the shards unless they exist already, and print a summary."""
    args = parse(argv)
    collection = choose_collection(args)
    recipe = choose_recipe(args, collection)
    try:
        # Checked without the lock too, for finished shards in read-only folders.
        if not (args.out / UNFINISHED).exists() and is_done(args, collection, recipe):
            return
        with writing(args.out, "--out "), locking(args.out / LOCK) as lock:
            if is_done(args, collection, recipe):
                forget(args.out / UNFINISHED)  # of a run that was killed at its very end
            else:
                make_all(args, collection, recipe, lock)
    except KeyboardInterrupt:
        print("interrupted: the same command resumes from here")
        sys.exit(128 + signal.SIGINT)


def make_all(
    args: argparse.Namespace, collection: Collection, recipe: Recipe, lock: Lock | None
) -> None:
    """Make the missing shards; nobody else does at the same time."""
    started = time.monotonic()
    work = args.out / UNFINISHED
    with removing_if_empty(args):
        catalogue = prepare(work, collection, describe(args, recipe))
        splits = choose_splits(args, catalogue)
    jobs = [job for split in splits for job in jobs_of(split, catalogue, args)]
    reports = make(ShardMaker(catalogue, work, splits, recipe), jobs, args, lock)
    with removing_if_empty(args):
        kinds = finish(args.out, splits, reports, collection, catalogue)
    summarize(args.out, reports, kinds, time.monotonic() - started)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.Parser(description=__doc__.partition("\n")[0])
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--images", type=Path, metavar="DIR", help="a folder of images")
    given.add_argument("--list", type=Path, metavar="FILE", help="a .txt, .csv, .tsv or .jsonl")
    given.add_argument(
        "--layout",
        nargs="+",
        metavar=("NAME", "DIR [SPLIT]"),
        help=f"a known data set: {', '.join(LAYOUTS)}",
    )
    given.add_argument(
        "--parquet", nargs="+", type=Path, metavar="FILE", help="tables of images, or folders"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="output folder")
    parser.add_argument("--root", type=Path, metavar="DIR", help="base folder of a list's paths")
    parser.add_argument(
        "--labels",
        choices=["folders", "none"],
        help="folders: class = first folder of --images, in natural order of names; none: no class",
    )
    pairs = parser.add_argument_group(
        "what belongs to the images: files of the same names in a folder"
    )
    pairs.add_argument("--segmentations", type=Path, metavar="DIR", help="label maps, .png")
    pairs.add_argument("--depth", type=Path, metavar="DIR", help="depth maps, .png")
    pairs.add_argument("--edges", metavar=f"DIR|{CANNY}", help="edge maps, .png, or compute them")
    pairs.add_argument(
        "--low-resolution", metavar="DIR|N", help="smaller images, or compute them, N times smaller"
    )
    pairs.add_argument("--captions", type=Path, metavar="DIR", help="captions, .txt")
    change = parser.add_argument_group("processing")
    change.add_argument(
        "--short-side", type=cli.COUNT, metavar="N", help="scale larger images down to N"
    )
    change.add_argument(
        "--quality",
        type=cli.number(int, at_least=1, at_most=100),
        default=95,
        metavar="N",
        help="quality of newly encoded JPEGs (95)",
    )
    change.add_argument(
        "--min-side", type=cli.COUNT, default=8, metavar="N", help="leave out smaller ones (8)"
    )
    change.add_argument(
        "--damaged",
        choices=(SKIP, USE),
        default=SKIP,
        help="a partly lost JPEG: leave it out (skip), or store what is left (use)",
    )
    shards = parser.add_argument_group("the shards")
    shards.add_argument(
        "--prefix", type=cli.file_prefix, metavar="NAME", help="for <prefix>-000000.tar ... (train)"
    )
    shards.add_argument(
        "--shard-samples", type=cli.COUNT, metavar="N", help="most images in each (1024)"
    )
    shards.add_argument(
        "--shard-bytes", type=parse_bytes, metavar="N[K|M|G]", help="most bytes in each"
    )
    shards.add_argument(
        "--val-fraction",
        type=cli.number(float, above=0, below=1),
        metavar="F",
        help="split by key: out/train and out/val",
    )
    parser.add_argument(
        "--workers", type=cli.COUNT, metavar="N", help="processes (default: all CPUs if worthwhile)"
    )
    args = parser.parse_args(argv)
    check(args)
    return args


def parse_bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+)([KMG]?)", text)
    if match is None or not int(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is not a size such as 500M or 1G")
    return int(match[1]) * 1024 ** " KMG".index(match[2] or " ")


def check(args: argparse.Namespace) -> None:
    """Raise `UserError` for arguments that cannot be combined."""
    if args.val_fraction is not None and args.prefix is not None:
        raise UserError("--val-fraction names the shards train-* and val-*: omit --prefix")
    if args.root is not None and args.list is None:
        raise UserError("--root requires --list: omit it")
    if args.labels == "folders" and args.images is None:
        raise UserError("--labels folders requires --images: omit it")
    if args.labels == "none" and args.layout is not None:
        raise UserError("--labels none requires --list or --parquet: omit it")


def choose_collection(args: argparse.Namespace) -> Collection:
    """The images that the arguments name, with their maps."""
    collection: Collection
    with_labels = args.labels != "none"
    if args.list is not None:
        collection = ImageList(args.list, args.root, with_labels)
    elif args.layout is not None:
        collection = open_layout(args.layout)
    elif args.parquet is not None:
        collection = ParquetTables(args.parquet, with_labels)
    elif args.labels == "folders":
        collection = ClassFolders(args.images)
    else:
        collection = ImageFolder(args.images)
    folders = {"segmentations": args.segmentations, "depth": args.depth}
    folders["captions"] = args.captions
    if args.edges != CANNY:
        folders["edges"] = args.edges
    if low_resolution_factor(args) is None:
        folders["low-resolution"] = args.low_resolution
    given = {name: Path(folder) for name, folder in folders.items() if folder is not None}
    for name, folder in given.items():
        if not folder.is_dir():
            raise UserError(f"--{name} {folder}: there is no such folder")
    columns = {PAIR_COLUMNS[name]: folder for name, folder in given.items()}
    return Paired(collection, columns) if columns else collection


def low_resolution_factor(args: argparse.Namespace) -> int | None:
    if args.low_resolution is None or not args.low_resolution.isdecimal():
        return None
    factor = int(args.low_resolution)
    if factor < 2:
        raise UserError(f"--low-resolution is {factor} but must be a folder or at least 2")
    return factor


def choose_recipe(args: argparse.Namespace, collection: Collection) -> Recipe:
    if args.edges == CANNY:
        require_canny()
    return Recipe(
        short_side=args.short_side,
        quality=args.quality,
        min_side=args.min_side,
        canny=args.edges == CANNY,
        low_resolution=low_resolution_factor(args),
        label_shift=collection.label_shift,
        use_damaged=args.damaged == USE,
    )


def describe(args: argparse.Namespace, recipe: Recipe) -> str:
    """Everything that the shards depend on except the files themselves, as text."""
    passed_over = ("out", "workers")
    given = {key: str(value) for key, value in vars(args).items() if key not in passed_over}
    return json.dumps([given, asdict(recipe)], sort_keys=True)


def is_done(args: argparse.Namespace, collection: Collection, recipe: Recipe) -> bool:
    """Whether the shards exist already; `UserError` if others do."""
    nearest = next(path for path in (args.out, *args.out.parents) if os.path.lexists(path))
    if not nearest.is_dir():
        raise UserError(f"--out {args.out}: {nearest} is a file: give a folder")
    folders = [folder for folder, _ in folders_of(args)]
    settings = describe(args, recipe)
    work = args.out / UNFINISHED
    if (work / PLAN).exists():
        if Catalogue(work).settings != settings:
            raise UserError(
                f"{work} is left from an interrupted run of another command: run that one again, "
                f"or delete {args.out}"
            )
        return False
    if not all((folder / MANIFEST).exists() for folder in folders):
        for folder in folders:
            if any(folder.glob("*.tar")):
                raise UserError(
                    f"{folder} already holds shards: choose another folder, or if they lack a "
                    f"{MANIFEST} run: python tools/index_shards.py {folder}/*.tar"
                )
        return False
    manifests = [Manifest.load(folder) for folder in folders]
    if any(m.details.get("inputs") != digest_of(collection, settings) for m in manifests):
        raise UserError(
            f"--out {args.out} holds shards with other images or settings: delete it or choose "
            f"another"
        )
    num_images = sum(shard.samples for manifest in manifests for shard in manifest.shards)
    line = f"{args.out} is complete: {count(num_images, 'image')}; nothing to do"
    print(printable(line))
    return True


def folders_of(args: argparse.Namespace) -> list[tuple[Path, str]]:
    """Folder and prefix of each split, training first."""
    if args.val_fraction is None:
        return [(args.out, args.prefix or "train")]
    return [(args.out / name, name) for name in ("train", "val")]


def prepare(work: Path, collection: Collection, settings: str) -> Catalogue:
    """The catalogue of an interrupted run of the same command, or a new one."""
    if not (work / PLAN).exists():
        print(printable(f"listing {collection.where}"), flush=True)
        return list_images(work, collection, settings)
    catalogue = Catalogue(work)
    line = f"resuming with {count(len(catalogue), 'image')} listed in {work}"
    print(printable(line), flush=True)
    return catalogue


def choose_splits(args: argparse.Namespace, catalogue: Catalogue) -> list[Split]:
    parts = split_by_key(catalogue, args.val_fraction or 0.0)
    splits = [
        Split(folder, prefix, images)
        for (folder, prefix), images in zip(folders_of(args), parts, strict=False)
    ]
    for split in splits:
        if not len(split.images):
            raise UserError(
                f"--val-fraction {args.val_fraction} leaves no image of {len(catalogue)} for "
                f"{split.prefix}: choose another"
            )
        split.folder.mkdir(parents=True, exist_ok=True)
    return splits


def jobs_of(split: Split, catalogue: Catalogue, args: argparse.Namespace) -> list[Job]:
    max_samples = args.shard_samples or (None if args.shard_bytes else 1024)
    bounds = cut(catalogue.sizes[split.images], max_samples, args.shard_bytes)
    ranges = zip(bounds, bounds[1:], strict=False)
    return [Job(split.prefix, number, *bound) for number, bound in enumerate(ranges)]


def make(
    maker: ShardMaker, jobs: list[Job], args: argparse.Namespace, lock: Lock | None
) -> list[Report]:
    """Do the jobs and show their progress; return the reports in the order of the shards."""
    workers = args.workers or (1 if len(jobs) < LEAST_SHARDS_IN_PARALLEL else num_cpus())
    reports = []
    total = sum(job.stop - job.start for job in jobs)
    with showing_progress(total) as advance:
        for report in run(maker, jobs, min(workers, len(jobs)), lock):
            reports.append(report)
            advance(report.images)
    return sorted(reports, key=lambda report: (report.split, report.number))


def num_cpus() -> int:
    """The number of CPUs that this process may use, if the system tells."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@contextmanager
def showing_progress(total: int) -> Iterator[Callable[[int], None]]:
    """Show a bar on a terminal, else an occasional line; call the result with the images done."""
    console = Console()
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("images"), TimeRemainingColumn())
    done, said = 0, time.monotonic()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", total=total)

        def advance(count: int) -> None:
            nonlocal done, said
            done += count
            progress.advance(bar, count)
            if not console.is_terminal and time.monotonic() - said > REPORT_EVERY_S:
                said = time.monotonic()
                print(f"{done} of {total} images", flush=True)

        yield advance


def finish(
    out: Path,
    splits: list[Split],
    reports: list[Report],
    collection: Collection,
    catalogue: Catalogue,
) -> Counter[str]:
    """Write the list of omitted files and, last, the manifests; return the omitted by kind."""
    shards = {
        split.folder: tuple(r.shard for r in reports if r.split == split.prefix and r.shard)
        for split in splits
    }
    for split in splits:
        if not shards[split.folder]:
            first = next(r.left_out[0] for r in reports if r.split == split.prefix)
            raise UserError(
                f"none of {len(split.images)} images can be used; the first: {first.name}: "
                f"{first.reason}"
            )
    kinds = write_left_out(out / LEFT_OUT, catalogue, reports)
    details = {
        "inputs": catalogue.digest,
        "notes": dict(sorted(add_up(report.notes for report in reports).items())),
        "left_out": dict(sorted(kinds.items())),
        **collection.details,
    }
    for folder, own in shards.items():
        Manifest(IMAGES_FORMAT, own, collection.classes, details).save(folder)
    forget(out / UNFINISHED)
    return kinds


def write_left_out(path: Path, catalogue: Catalogue, reports: list[Report]) -> Counter[str]:
    """Write a line for each omitted file, print the first ones, and count them by kind.

    Hidden names are printed once each: some network drives have them in every folder.
    """
    kinds: Counter[str] = Counter()
    hidden: Counter[str] = Counter()
    with replacing(path) as file:
        for entry in chain(catalogue.left_out(), *(report.left_out for report in reports)):
            file.write(json.dumps(json_safe(asdict(entry)), allow_nan=False).encode() + b"\n")
            kinds[entry.kind] += 1
            if entry.kind == HIDDEN:
                hidden[last_name(entry.name)] += 1
            elif kinds.total() - hidden.total() <= PRINTED_FILES:
                print(printable(f"left out: {entry.name}: {entry.reason}"))
    if hidden:
        names = (f"{name} ({number})" for name, number in hidden.most_common(PRINTED_FILES))
        print(printable(f"left out, hidden or system files: {', '.join(names)}; see {path}"))
    if not kinds:
        path.unlink()
    elif (others := kinds.total() - hidden.total()) > PRINTED_FILES:
        print(printable(f"left out: {others - PRINTED_FILES} more, all listed in {path}"))
    return kinds


def add_up(counts: Iterable[Mapping[str, int]]) -> Counter[str]:
    total: Counter[str] = Counter()
    for one in counts:
        total.update(one)
    return total


def summarize(out: Path, reports: list[Report], kinds: Counter[str], seconds: float) -> None:
    """Print the number of images and the notes on them; the speed is that of this run alone."""
    num_written = sum(report.shard.samples for report in reports if report.shard)
    num_made = sum(r.shard.samples for r in reports if r.shard and not r.was_kept)
    line = (
        f"{count(num_written, 'image')} in {out} ({num_made / seconds:.0f} images/s); "
        f"{count(kinds.total(), 'file')} left out"
    )
    print(printable(line))
    kept = sum(report.was_kept for report in reports)
    if kept:
        print(f"  {count(kept, 'shard')} from an interrupted run checked and kept")
    num_classes = sum(report.shard.columns.get("cls", 0) for report in reports if report.shard)
    if 0 < num_classes < num_written:
        print(
            f"  without a class: {count(num_written - num_classes, 'image')}, "
            f"so codes made from these shards have no classes"
        )
    notes = add_up(report.notes for report in reports)
    for title, counts in (("of the images", notes), ("left out", kinds)):
        if counts:
            print(f"  {title}: " + ", ".join(f"{counts[name]} {name}" for name in sorted(counts)))


@contextmanager
def removing_if_empty(args: argparse.Namespace) -> Iterator[None]:
    """After a mistake, leave nothing behind unless there are shards to resume from."""
    try:
        yield
    except (UserError, OSError):
        folders = [folder for folder, _ in folders_of(args)]
        if not any(True for folder in folders for _ in folder.glob("*.tar")):
            forget(args.out / UNFINISHED)
            for folder in folders:
                if folder.is_dir() and not any(folder.iterdir()):
                    folder.rmdir()
        raise


if __name__ == "__main__":
    cli.run(main)
