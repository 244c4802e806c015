"""`tools/benchmark.py data`: reading and decoding images, beside webdataset and bare decoding.

Every case does the same work on the same JPEGs (short side 256, quality 95, cut from photographs):
batches of uint8, cropped at random to 256 px and flipped. Cost is processor time of all processes
together in the midst of reading: a busy machine changes the figures little. Cores that are busy
at once slow each other down (caches, clock, siblings), so the limit is measured in as many threads
as the reader has, by turns with it, and in one. The last figure is what a trainer sees that takes
200 images a second.
"""

import argparse
import io
import itertools
import json
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks.cases import shown
from benchmarks.machine import default_device, describe
from benchmarks.rows import Rows, this_run
from taming_dist import cli

SIZE, BATCH, SHARD = 256, 64, 256
CONSUMED_PER_S = 200
FIRST = 1024  # images that are read before the clock starts
TURN = 256  # images of the reader, then of simplejpeg alone, and so on
PATHS = ("taming_dist/data", "taming_dist/formats", "tools/benchmarks/data.py")
SHORT = ["--images", "2048", "--rounds", "1"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--images", type=cli.COUNT, default=4096, help="images read per case and round"
    )
    parser.add_argument("--rounds", type=cli.COUNT, default=3, help="rounds of all cases")
    parser.add_argument("--threads", type=cli.COUNT, default=2, help="decoding threads or workers")
    parser.add_argument("--case", choices=sorted(CASES), help=argparse.SUPPRESS)
    parser.add_argument("--shards", type=Path, help=argparse.SUPPRESS)


def run(arguments: argparse.Namespace) -> Rows | None:
    """Run every case in a process of its own, in turn, and print the medians."""
    if arguments.case:
        from taming_dist.memory import keep_freed_memory

        keep_freed_memory()  # as every command does
        print(json.dumps(CASES[arguments.case](arguments), allow_nan=False))
        return None
    begun = this_run(describe(default_device(), {}))
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        mean_bytes = write_photographs(Path(folder), 4 * SHARD)
        for _ in range(arguments.rounds):
            for case in CASES:
                command = [sys.executable, sys.argv[0], "data", "--case", case, "--shards", folder]
                command += ["--images", str(arguments.images), "--threads", str(arguments.threads)]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                for name, value in json.loads(done.stdout.splitlines()[-1]).items():
                    found.setdefault(name, []).append(value)
    figures = {name: statistics.median(values) for name, values in found.items()}
    figures["an image, bytes"] = mean_bytes
    for other in ("bare simplejpeg in one thread", "webdataset", "webdataset without workers"):
        figures[f"reader / {other}"] = (
            figures["reader, images per CPU-s"] / (figures[f"{other}, images per CPU-s"])
        )
    return shown("data", figures, PATHS, begun)


def write_photographs(folder: Path, count: int) -> float:
    """Shards of crops of photographs, of a few shapes; gives the mean bytes of an image."""
    from demo_photographs import PHOTOGRAPHS, load

    from taming_dist.formats.manifest import IMAGES_FORMAT, Manifest
    from taming_dist.formats.shards import write_shard

    photographs = [load(photograph) for photograph in PHOTOGRAPHS.values()]
    rng = random.Random(0)
    total = 0

    def samples(numbers: range) -> Iterator[tuple[str, dict[str, bytes]]]:
        nonlocal total
        for number in numbers:
            photo = photographs[number % len(photographs)]
            long = rng.choice((256, 320, 384))
            width, height = rng.choice(((long, SIZE), (SIZE, long)))
            scale = rng.uniform(0.5, 1) * min(photo.width / width, photo.height / height)
            left = rng.uniform(0, photo.width - width * scale)
            top = rng.uniform(0, photo.height - height * scale)
            box = (left, top, left + width * scale, top + height * scale)
            file = io.BytesIO()
            photo.resize((width, height), box=box).save(file, "JPEG", quality=95)
            total += file.tell()
            yield f"{number:06d}", {"jpg": file.getvalue(), "cls": b"%d" % (number % 12)}

    shards = []
    for start in range(0, count, SHARD):
        path = folder / f"train-{start // SHARD:06d}.tar"
        shards.append(write_shard(path, samples(range(start, min(count, start + SHARD)))))
    Manifest(IMAGES_FORMAT, tuple(shards)).save(folder)
    return total / count


def reader(arguments: argparse.Namespace) -> dict[str, float]:
    """The reader of this package and the limit, simplejpeg alone on bytes in memory in as many
    threads, by turns: what else happens on the machine meets both."""
    batches, (decode, encoded) = read(arguments), bare_work(arguments)
    counts = map(len, batches)
    _take(counts, FIRST)
    processes = family()
    costs: dict[str, list[float]] = {"reader": [], "bare": []}
    with ThreadPoolExecutor(arguments.threads) as pool:
        for _ in range(max(1, arguments.images // TURN)):
            start = settled_seconds(processes)
            _take(counts, TURN)
            costs["reader"].append(settled_seconds(processes) - start)
            start = processor_seconds(processes)
            list(pool.map(decode, itertools.islice(encoded, TURN // BATCH)))
            costs["bare"].append(processor_seconds(processes) - start)
    shares = [bare / ours for bare, ours in zip(costs["bare"], costs["reader"], strict=True)]
    return {
        "bare simplejpeg, images per CPU-s": TURN / statistics.median(costs["bare"]),
        "reader, images per CPU-s": TURN / statistics.median(costs["reader"]),
        "reader / bare simplejpeg by turns": statistics.median(shares),
        "reader's process at its peak, MB": peak_mb(processes[1:]),
    }


def bare_alone(arguments: argparse.Namespace) -> dict[str, float]:
    """The limit in one thread, while the other cores idle and leave it their share of the chip."""
    decode, encoded = bare_work(arguments)
    speed, _ = measured(lambda: map(decode, encoded), arguments.images)
    return {"bare simplejpeg in one thread, images per CPU-s": speed}


def bare_work(
    arguments: argparse.Namespace,
) -> tuple[Callable[[list[bytes]], int], Iterator[list[bytes]]]:
    """What decodes a batch and counts it, and endless batches of bytes."""
    import simplejpeg
    import webdataset

    shards = sorted(map(str, arguments.shards.glob("*.tar")))
    encoded = [sample["jpg"] for sample in webdataset.WebDataset(shards, shardshuffle=False)]
    batches = [encoded[start : start + BATCH] for start in range(0, len(encoded), BATCH)]

    def decode(batch: list[bytes]) -> int:
        for data in batch:
            simplejpeg.decode_jpeg(data)
        return len(batch)

    return decode, itertools.cycle(batches)


def consumed(arguments: argparse.Namespace) -> dict[str, float]:
    """The share of its time that a consumer of 200 images per second waits for the reader."""
    batches, waited = read(arguments, 16), 0.0
    next(batches)
    start = time.perf_counter()
    for number in range(1, arguments.images // 16):
        asked = time.perf_counter()
        next(batches)
        got = time.perf_counter()
        waited += got - asked
        time.sleep(max(0.0, start + number * 16 / CONSUMED_PER_S - got))
    return {
        "share of its time that a consumer of 200 images/s waits": waited
        / (time.perf_counter() - start)
    }


def read(arguments: argparse.Namespace, batch: int = BATCH) -> Iterator[Any]:
    """Batches of the reader; its process ends with the iterator."""
    from taming_dist.data.images import Preprocess, RandomCrop
    from taming_dist.data.reader import Reader, Reading
    from taming_dist.formats.manifest import resolve

    preprocess = Preprocess(SIZE, RandomCrop(), flip=True)
    dataset = resolve(str(arguments.shards))
    return Reader(dataset, Reading(preprocess, batch, threads=arguments.threads)).batches()


def stock(arguments: argparse.Namespace) -> dict[str, float]:
    """webdataset with its loader's processes, as its documentation has it."""
    return stock_with(arguments, arguments.threads, "webdataset")


def stock_alone(arguments: argparse.Namespace) -> dict[str, float]:
    """webdataset in the process that uses it: no transport, and the trainer waits meanwhile."""
    return stock_with(arguments, 0, "webdataset without workers")


def stock_with(arguments: argparse.Namespace, workers: int, name: str) -> dict[str, float]:
    import torch
    import webdataset

    def batches() -> Iterator[int]:
        shards = sorted(map(str, arguments.shards.glob("*.tar")))
        dataset = (
            webdataset.WebDataset(shards, shardshuffle=len(shards), seed=0)
            .shuffle(1000)
            .decode("rgb8")
            .to_tuple("jpg", "cls")
            .map_tuple(crop_and_flip, torch.tensor)
            .batched(BATCH, partial=False)
            .repeat()
        )
        loader = webdataset.WebLoader(dataset, batch_size=None, num_workers=workers)
        return (len(images) for images, _ in loader)

    speed, memory = measured(batches, arguments.images)
    return {f"{name}, images per CPU-s": speed} | (
        {f"{name}, a worker at its peak, MB": memory} if workers else {}
    )


def crop_and_flip(pixels: np.ndarray) -> np.ndarray:
    """A random square of an image, flipped half of the time."""
    top = random.randrange(pixels.shape[0] - SIZE + 1)
    left = random.randrange(pixels.shape[1] - SIZE + 1)
    square = pixels[top : top + SIZE, left : left + SIZE]
    return np.ascontiguousarray(square[:, ::-1] if random.random() < 0.5 else square)


def measured(source: Callable[[], Iterator[int]], images: int) -> tuple[float, float]:
    """Images per CPU second of all processes once the first images are there, and the peak memory
    in MB of the largest process that the source started."""
    counts = source()
    _take(counts, FIRST)
    processes = family()
    start = processor_seconds(processes)
    taken = _take(counts, images)
    used = processor_seconds(processes) - start
    memory = peak_mb(processes[1:])
    close = getattr(counts, "close", None)
    if close is not None:
        close()
    del counts
    return taken / used, memory


def peak_mb(processes: list[psutil.Process]) -> float:
    """The peak memory of the largest of these processes so far; 0 if there are none."""
    # Not getrusage, which counts what a process had as a copy of its parent, before it was another.
    found = [Path(f"/proc/{process.pid}/status").read_text() for process in processes]
    peaks = [int(text.partition("VmHWM:")[2].split()[0]) for text in found]
    return max(peaks, default=0) / 1024


def _take(counts: Iterator[int], images: int) -> int:
    taken = 0
    while taken < images:
        taken += next(counts)
    return taken


def family() -> list[psutil.Process]:
    """This process and those that it started, and they, and that still run."""
    here = psutil.Process()
    return [here, *here.children(recursive=True)]


def processor_seconds(processes: list[psutil.Process]) -> float:
    """Processor time of processes so far, from Linux's clock of each: /proc counts in 10 ms."""
    clocks = [(~process.pid << 3) | 2 for process in processes]  # as clock_getcpuclockid(3) does
    return sum(map(time.clock_gettime, clocks))


def settled_seconds(processes: list[psutil.Process]) -> float:
    """`processor_seconds` once nothing works any more: all that may be read ahead is there."""
    before, now = -1.0, processor_seconds(processes)
    while now > before + 0.005:
        time.sleep(0.05)
        before, now = now, processor_seconds(processes)
    return now


CASES: dict[str, Callable[[argparse.Namespace], dict[str, float]]] = {
    "reader": reader,
    "bare-alone": bare_alone,
    "stock": stock,
    "stock-alone": stock_alone,
    "consumed": consumed,
}
