"""Turn image shards into code shards with a trained VQGAN; stage 2 then never runs the encoder.

    python tools/tokenize_dataset.py --model EXPORT --shards SPEC --out DIR

Also under torchrun or srun: every process takes its share of the source ranges, one output shard
each, so the bytes do not depend on the number of processes. Finished shards are kept: run it
again to go on. Whoever finds all shards finished writes the manifest.
"""

import argparse
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from taming_dist import cli
from taming_dist.data.codes import CodeShard, codes_dtype, write_codes_manifest
from taming_dist.data.images import Preprocess
from taming_dist.data.manifest import CODES_FORMAT, MANIFEST, Dataset, Manifest, resolve
from taming_dist.data.reader import Batch, Reader
from taming_dist.engine.world import Place, choose_device, place
from taming_dist.errors import UserError
from taming_dist.models.vqgan import VQGAN, check_size

VIEWS = {"center": ["center"], "flip": ["center", "flipped"]}
REPORT_EVERY_S = 5.0


@dataclass(frozen=True)
class Job:
    """What all processes agree on: the model, the images, and where codes go."""

    model: VQGAN
    dataset: Dataset
    out: Path
    prefix: str
    shard_samples: int
    preprocessing: dict[str, Any]
    fingerprint: str

    @property
    def ranges(self) -> list[tuple[Path, int, int]]:
        """For each output shard its file and its range [start, stop) of source samples."""
        last = self.dataset.num_samples
        return [
            (
                self.out / f"{self.prefix}-{number:06d}.tar",
                start,
                min(start + self.shard_samples, last),
            )
            for number, start in enumerate(range(0, last, self.shard_samples))
        ]

    def facts(self, start: int, stop: int) -> dict[str, Any]:
        """What a shard of this job says of itself, but for what its images decide."""
        return {
            "tokenizer": {"fingerprint": self.fingerprint},
            "vocab": self.model.config.vocabulary,
            "source": {"fingerprint": self.dataset.fingerprint, "range": [start, stop]},
            "preprocessing": self.preprocessing,
        }

    def is_finished(self, path: Path, start: int, stop: int) -> bool:
        """Whether a whole shard of this range is there; `UserError` if it is of another job."""
        if not path.exists():
            return False
        try:
            found = CodeShard.open(path).facts
        except UserError as damage:
            print(f"{damage}; it is made again", flush=True)
            return False
        self._refuse_other(path, found)
        return found["source"]["range"] == [start, stop]

    def check_out(self) -> None:
        """Raise `UserError` if the folder holds anything but shards of this job."""
        if self.out.exists() and not self.out.is_dir():
            raise UserError(f"--out {self.out} is a file: give a folder")
        if (self.out / MANIFEST).exists():
            manifest = Manifest.load(self.out)
            if manifest.format != CODES_FORMAT:
                raise UserError(f"--out {self.out} holds {manifest.format} shards: {OTHER_OUT}")
            self._refuse_other(self.out, manifest.details)
        expected = {path for path, _, _ in self.ranges}
        for path in self.out.glob("*.tar"):
            if path not in expected:
                raise UserError(f"--out {self.out} holds {path.name}, of another job: {OTHER_OUT}")

    def _refuse_other(self, path: Path, found: dict[str, Any]) -> None:
        theirs = found["tokenizer"]["fingerprint"]
        if theirs != self.fingerprint:
            raise UserError(
                f"{path} holds codes of the tokenizer {theirs}, but --model is "
                f"{self.fingerprint}: {OTHER_OUT}"
            )
        if found["source"]["fingerprint"] != self.dataset.fingerprint:
            raise UserError(f"{path} holds codes of other images than --shards names: {OTHER_OUT}")
        if found["preprocessing"] != self.preprocessing:
            raise UserError(
                f"{path} holds codes made with {found['preprocessing']}, now asked for is "
                f"{self.preprocessing}: {OTHER_OUT}"
            )


OTHER_OUT = "choose another --out, or delete it"


def main(argv: Sequence[str] | None = None) -> None:
    """Encode this process's share of the shards; write the manifest if nothing is missing then."""
    args = parse(argv)
    # No process group is made, so the address of the first process is of no interest.
    where = place({"MASTER_ADDR": "", "MASTER_PORT": "0", **os.environ})
    job = make_job(args)
    job.check_out()
    job.out.mkdir(parents=True, exist_ok=True)
    mine = job.ranges[where.rank :: where.world_size]
    todo = [part for part in mine if not job.is_finished(*part)]
    if todo:
        encode_all(job, todo, where, args)
    finish(job, where, did_something=bool(todo))


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True, help="export folder of a VQGAN")
    parser.add_argument("--shards", required=True, nargs="+", help="folder, glob or braces")
    parser.add_argument("--out", type=Path, required=True, help="folder of the code shards")
    parser.add_argument("--views", choices=sorted(VIEWS), default="center")
    parser.add_argument("--size", type=int, help="pixels of the square crop [as in training]")
    parser.add_argument("--batch", type=int, default=64, help="images at a time")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--shard-samples", type=int, default=16384, help="images per code shard")
    parser.add_argument("--prefix", default="codes-train", help="shards are <prefix>-000000.tar")
    parser.add_argument("--threads", type=int, default=2, help="decoding threads per process")
    args = parser.parse_args(argv)
    for name in ("batch", "shard_samples", "threads"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1")
    return args


def make_job(args: argparse.Namespace) -> Job:
    """Load the model and find the images; mistakes end here, before anything is written."""
    dataset = resolve(args.shards)
    model = VQGAN.from_pretrained(args.model)
    size = args.size or model.config.resolution
    check_size(size, model.config.factor, "--size")
    preprocessing = {
        "size": size,
        "resize": "short side, lanczos",
        "crop": "center",
        "views": VIEWS[args.views],
        "precision": args.precision,
    }
    return Job(
        model.eval(),
        dataset,
        args.out,
        args.prefix,
        args.shard_samples,
        preprocessing,
        model.fingerprint,
    )


def encode_all(
    job: Job, todo: list[tuple[Path, int, int]], where: Place, args: argparse.Namespace
) -> None:
    """Encode some ranges, each into its shard."""
    device = choose_device(where.local_rank)
    job.model.to(device)
    bad: list[dict[str, Any]] = []
    reader = Reader(
        job.dataset,
        Preprocess(job.preprocessing["size"]),
        columns=job.model.config.modality.files,
        micro_batch=args.batch,
        threads=args.threads,
        on_bad=bad.append,
        max_bad_fraction=1.0,
    )
    progress = Progress(sum(stop - start for _, start, stop in todo), where)
    for path, start, stop in todo:
        bad.clear()
        encoded = []
        for batch in reader.epoch_batches(start, stop):
            encoded.append((batch, encode(job, batch, device)))
            progress.advance(len(batch))
        for record in bad:
            print(f"left out: {record['key']} in {record['shard']}: {record['error']}", flush=True)
        shard = make_shard(job, encoded, (start, stop), bad, reader.has_classes)
        shard.save(path, writer=f"rank{where.rank}")
    progress.report()


@torch.inference_mode()
def encode(job: Job, batch: Batch, device: torch.device) -> np.ndarray:
    """Codes of all views of a batch, [b, views, i, j]."""
    modality = job.model.config.modality
    column = getattr(batch, modality.column)
    modality.check(column)
    images = modality.tensor(column.to(device, non_blocking=True))
    is_bf16 = job.preprocessing["precision"] == "bf16"
    views = [images, images.flip(-1)] if "flipped" in job.preprocessing["views"] else [images]
    with torch.autocast(device.type, torch.bfloat16, enabled=is_bf16):
        codes = [job.model.encode(view) for view in views]
    return torch.stack(codes, dim=1).cpu().numpy().astype(codes_dtype(job.model.config.vocabulary))


def make_shard(
    job: Job,
    encoded: list[tuple[Batch, np.ndarray]],
    part: tuple[int, int],
    bad: list[dict[str, Any]],
    has_classes: bool,
) -> CodeShard:
    """Put the batches of a range together; samples that could not be read have no row."""
    facts = job.facts(*part)
    facts["source"]["bad"] = [
        {"shard": Path(record["shard"]).name, "key": record["key"], "offset": record["offset"]}
        for record in bad
    ]
    side = job.preprocessing["size"] // job.model.config.factor
    views = len(job.preprocessing["views"])
    dtype = codes_dtype(job.model.config.vocabulary)
    codes = [np.empty((0, views, side, side), dtype), *(codes for _, codes in encoded)]
    sources = [np.empty(0, np.int64), *(batch.ids.numpy() for batch, _ in encoded)]
    classes = [np.empty(0, np.int32)]
    classes += [batch.classes.numpy() for batch, _ in encoded if batch.classes is not None]
    return CodeShard(
        facts,
        codes=np.concatenate(codes),
        sources=np.concatenate(sources),
        keys=[key for batch, _ in encoded for key in batch.keys],
        classes=np.concatenate(classes).astype(np.int32) if has_classes else None,
    )


def finish(job: Job, where: Place, did_something: bool) -> None:
    """Write the manifest if all shards are there, whoever made them."""
    who = f"rank {where.rank}: " if where.world_size > 1 else ""
    missing = [path for path, start, stop in job.ranges if not job.is_finished(path, start, stop)]
    if missing:
        print(f"{who}done; {len(missing)} shards of other processes are not finished yet")
        return
    if (job.out / MANIFEST).exists() and not did_something:
        print(f"{who}{job.out} is complete; nothing to do")
        return
    names = [path.name for path, _, _ in job.ranges]
    manifest = write_codes_manifest(job.out, names, job.dataset.classes, writer=f"rank{where.rank}")
    samples = sum(shard.samples for shard in manifest.shards)
    left_out = manifest.details["source"]["bad"]
    print(f"{who}{samples} images in {len(names)} code shards, {left_out} left out: {job.out}")


class Progress:
    """Prints a line every few seconds: images so far, and how fast."""

    def __init__(self, total: int, where: Place) -> None:
        self._total, self._done = total, 0
        self._who = f"rank {where.rank}: " if where.world_size > 1 else ""
        self._started = self._reported = time.monotonic()

    def advance(self, count: int) -> None:
        self._done += count
        if time.monotonic() - self._reported > REPORT_EVERY_S:
            self.report()

    def report(self) -> None:
        self._reported = time.monotonic()
        speed = self._done / max(self._reported - self._started, 1e-9)
        print(f"{self._who}{self._done} of {self._total} images, {speed:.1f} images/s", flush=True)


if __name__ == "__main__":
    cli.run(main)
