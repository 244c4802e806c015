"""`tools/benchmark.py codes`: reading code shards, and writing them.

Codes of 256 tokens, shuffled, beside one .npy per sample in a stock webdataset pipeline; single
reads; bytes and memory per sample; tokenization beside nothing but the encoder. Rates are per
second of this process's CPU time, which a shared machine disturbs least; medians.
"""

import argparse
import io
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from benchmarks.cases import shown
from benchmarks.machine import default_device, describe
from benchmarks.rows import Rows, this_run
from taming_dist import cli
from taming_dist.data.codes import CodeDataset, CodeReader
from taming_dist.formats.code_shards import CodeShard, write_codes_manifest
from taming_dist.formats.manifest import IMAGES_FORMAT, Manifest, resolve
from taming_dist.formats.shards import TarWriter, write_shard

TOKENS, VOCABULARY, SHARD, BATCH = 256, 16384, 16384, 64
MANY = 10_000_000
READING = ("codes", "code_columns", "plan")
PATHS = (
    *(f"taming_dist/data/{name}.py" for name in READING),
    "taming_dist/formats/code_shards.py",
    "taming_dist/prepare/tokenization",
    "tools/benchmarks/codes.py",
)
SHORT = ["--shards", "4", "--images", "16", "--repeats", "3"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shards", type=cli.COUNT, default=16, help="code shards of 16,384 samples"
    )
    parser.add_argument("--repeats", type=cli.COUNT, default=5, help="measurements of each kind")
    parser.add_argument("--images", type=cli.COUNT, default=64, help="images that are tokenized")


def run(arguments: argparse.Namespace) -> Rows:
    """Measure everything and print a table."""
    torch.set_num_threads(1)
    begun = this_run(describe(default_device(), {}))
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        codes = write_codes(folder / "codes", arguments.shards)
        figures: dict[str, float] = {}
        for part in (
            lambda: reading(codes, arguments.repeats),
            lambda: stock(folder / "stock.tar", arguments.repeats),
            lambda: memory(codes, folder / "many"),
            lambda: tokenizing(folder, arguments.images, arguments.repeats),
        ):
            figures |= part()
    return shown("codes", figures, PATHS, begun)


def write_codes(folder: Path, shards: int) -> Path:
    """Random codes of one view and 16 x 16 codes."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    names = [f"codes-train-{number:06d}.tar" for number in range(shards)]
    for number, name in enumerate(names):
        ids = np.arange(number * SHARD, (number + 1) * SHARD)
        facts = {
            "vocab": VOCABULARY,
            "tokenizer": {"fingerprint": "f" * 64},
            "source": {
                "fingerprint": "e" * 64,
                "range": [int(ids[0]), int(ids[-1]) + 1],
                "bad": [],
            },
            "preprocessing": {"size": 256},
        }
        codes = generator.integers(VOCABULARY, size=(SHARD, 1, 16, 16), dtype=np.uint16)
        classes = generator.integers(1000, size=SHARD, dtype=np.int32)
        CodeShard(facts, codes, ids, [f"{id:08d}" for id in ids], classes).save(folder / name)
    write_codes_manifest(folder, names, None)
    return folder


def reading(folder: Path, repeats: int) -> dict[str, float]:
    """Shuffled batches as stage 2 takes them, single samples, and bytes per sample."""
    dataset = CodeDataset.open(str(folder))
    batches = CodeReader(dataset, micro_batch=BATCH).batches()
    count = min(1024, dataset.num_samples // BATCH)

    def shuffled() -> int:
        return sum(batch.codes.numel() for batch in islice(batches, count))

    ids = np.random.default_rng(1).integers(dataset.num_samples, size=4096)

    def single() -> int:
        for id in ids[:, None]:
            dataset.take(id)
        return len(ids)

    shuffled()  # every shard is checked when it is first read
    size = sum(path.stat().st_size for path in folder.glob("*.tar"))
    return {
        "shuffled, M tokens/s": rate(shuffled, repeats) / 1e6,
        "single samples, reads/s": rate(single, repeats),
        "a sample of 256 tokens, bytes": size / dataset.num_samples,
    }


def stock(path: Path, repeats: int, samples: int = 8192) -> dict[str, float]:
    """One .npy and .cls per sample, through a stock webdataset pipeline."""
    import webdataset as wds

    generator = np.random.default_rng(0)
    with open(path, "wb") as file:
        tar = TarWriter(file)
        for number in range(samples):
            out = io.BytesIO()
            np.save(out, generator.integers(VOCABULARY, size=(16, 16), dtype=np.uint16))
            tar.add(f"{number:08d}.npy", out.getvalue())
            tar.add(f"{number:08d}.cls", b"%d" % generator.integers(1000))
        tar.finish()

    def batches() -> int:
        pipeline = wds.WebDataset(str(path), shardshuffle=False).shuffle(1000).decode()
        found = pipeline.to_tuple("npy", "cls").batched(BATCH)
        return sum(codes.size for codes, _ in found)

    return {
        "stock webdataset, .npy per sample, M tokens/s": rate(batches, repeats) / 1e6,
        "stock webdataset, a sample, bytes": path.stat().st_size / samples,
    }


def memory(codes: Path, folder: Path) -> dict[str, float]:
    """Memory that reading 10 million samples takes, in MB, without pages of mapped files.

    The samples are many names of the shards that are there, so that they fit on any disk.
    """
    folder.mkdir()
    real = sorted(codes.glob("*.tar"))
    names = [f"codes-train-{number:06d}.tar" for number in range(MANY // SHARD)]
    known = Manifest.load(codes).by_name
    entries = {}
    for number, name in enumerate(names):
        source = real[number % len(real)]
        os.link(source, folder / name)
        entries[name] = replace(known[source.name], name=name)
    write_codes_manifest(folder, names, None, known=entries)
    before = anonymous_bytes()
    dataset = CodeDataset.open(str(folder))
    for batch in islice(CodeReader(dataset, micro_batch=BATCH).batches(), 4096):
        assert len(batch) == BATCH
    return {
        "the reader of these, samples": float(dataset.num_samples),
        "memory of their reader, MB": (anonymous_bytes() - before) / 1e6,
    }


def tokenizing(folder: Path, images: int, repeats: int) -> dict[str, float]:
    """CPU time of tokenizing JPEGs of 256 px over that of the encoder alone, in percent."""
    import simplejpeg

    from taming_dist.engine.world import choose_device
    from taming_dist.models.quantizers import VectorQuantizerConfig
    from taming_dist.models.vqgan import VQGAN, VQGANConfig
    from taming_dist.prepare.tokenization.encoder import Encoder
    from taming_dist.prepare.tokenization.job import Job
    from taming_dist.prepare.tokenization.progress import Progress
    from taming_dist.prepare.tokenization.views import Center

    generator = np.random.default_rng(0)
    samples = []
    for number in range(images):
        coarse = generator.integers(0, 256, (20, 24, 3), dtype=np.uint8)
        pixels = np.ascontiguousarray(coarse.repeat(15, 0).repeat(15, 1))
        samples.append((f"{number:04d}", {"jpg": simplejpeg.encode_jpeg(pixels)}))
    (folder / "images").mkdir()
    shard = write_shard(folder / "images" / "train-000000.tar", samples)
    Manifest(IMAGES_FORMAT, (shard,)).save(folder / "images")
    model = VQGAN(VQGANConfig(VectorQuantizerConfig(codes=1024, dim=256), 256, channels=64))
    dataset = resolve(str(folder / "images"))
    job = Job(model, None, dataset, Center(256), 256, "fp32", folder / "out", "codes", images)
    job.out.mkdir()
    encoder = Encoder(job, choose_device(), 8, 1, Progress("", images))
    inputs = torch.rand(8, 3, 256, 256) * 2 - 1

    @torch.inference_mode()
    def alone() -> int:
        for _ in range(images // 8):
            model.encode(inputs.to(encoder.device)).cpu()
        return images

    def whole() -> int:
        encoder.encode(job.parts[0]).save(job.parts[0].path)
        return images

    alone()
    pairs = [(cpu_seconds(whole), cpu_seconds(alone)) for _ in range(repeats)]
    overheads = [100 * (one / other - 1) for one, other in pairs]
    return {"tokenization over the encoder alone, %": statistics.median(overheads)}


def rate(work: Callable[[], int], repeats: int) -> float:
    """Median of what `work` says it did per second of CPU time."""
    rates = []
    for _ in range(repeats):
        start = time.process_time()
        done = work()
        rates.append(done / (time.process_time() - start))
    return statistics.median(rates)


def cpu_seconds(work: Callable[[], int]) -> float:
    """CPU time of this process that `work` takes."""
    start = time.process_time()
    work()
    return time.process_time() - start


def anonymous_bytes() -> int:
    """Memory of this process that is no mapped file."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.partition("RssAnon:")[2].split()[0])
