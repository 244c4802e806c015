"""Writing the shards of a catalogue in parallel, so that an interrupted run can resume.

A shard is a range of a fixed order of the images and depends on nothing else: neither on the
number of processes nor on what existed before. Beside the catalogue lies a report for every
finished shard; a run that finds the report and a matching shard does not make it again.
"""

import errno
import json
import multiprocessing
import os
import signal
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from itertools import chain
from multiprocessing import forkserver, reduction
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import xxhash

from taming_dist.errors import UserError
from taming_dist.formats.manifest import IDX, Shard
from taming_dist.formats.shards import measure, write_shard
from taming_dist.formats.strict_json import write_json
from taming_dist.prepare.collections.entry import LeftOut
from taming_dist.prepare.making.catalogue import Catalogue, key_of
from taming_dist.prepare.making.layers import Unfit
from taming_dist.prepare.making.samples import Recipe, make_sample

# Workers of a run that was killed end within moments, in the middle of a file or not.
LOCK_PATIENCE_S = 1.0
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@dataclass(frozen=True)
class Split:
    """A folder of shards named `<prefix>-000000.tar` ..., and its images in order."""

    folder: Path
    prefix: str
    images: np.ndarray  # int64 [n], numbers in the catalogue


@dataclass(frozen=True)
class Job:
    """A shard to be made from the images [start, stop) of a split."""

    split: str
    number: int
    start: int
    stop: int

    @property
    def name(self) -> str:
        """The name of the tar file."""
        return f"{self.split}-{self.number:06d}.tar"


@dataclass(frozen=True)
class Report:
    """The outcome of a job: the shard, or None if no image could be used; and the counts."""

    split: str
    number: int
    images: int
    shard: Shard | None
    index_digest: str = ""
    notes: dict[str, int] = field(default_factory=dict)
    left_out: tuple[LeftOut, ...] = ()
    was_kept: bool = False


@dataclass(frozen=True)
class Lock:
    """A lock that is held; a worker process that is given it holds it too, until both end."""

    descriptor: int

    def __reduce__(self) -> tuple[Any, ...]:
        return _receive, (reduction.DupFd(self.descriptor),)


def _receive(sent: Any) -> Lock:
    return Lock(sent.detach())


@contextmanager
def locking(path: Path) -> Iterator[Lock | None]:
    """Hold the lock file `path`, which is made in its folder, as is that, and goes away at the end.

    The kernel (flock) releases it when the last process that holds it has ended, however it ended.
    A folder in which nothing is then goes away as well. Where the file system knows no locks, a
    line says so and the lock is None.

    Raises:
        UserError: another run has the lock.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    held: list[int] = []
    # No fallback: a lock that is merely a file would outlive a run that was killed.
    lock = filelock.FileLock(path, LOCK_PATIENCE_S, fallback_to_soft=False, on_acquired=held.append)
    try:
        lock.acquire()
    except filelock.Timeout as error:
        holder = path.read_text() if path.exists() else ""
        raise UserError(
            f"another run makes shards in {path.parent} ({holder or 'it has just begun'}): "
            f"wait until it ends, or choose another folder"
        ) from error
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        print(f"{path.parent}: its file system has no locks; start no second run there", flush=True)
    try:
        if held:
            os.truncate(held[0], 0)  # what a run that was killed wrote
            os.write(held[0], f"process {os.getpid()} of {socket.gethostname()}".encode())
        yield Lock(held[0]) if held else None
    finally:
        path.unlink(missing_ok=True)  # while it is held: whoever waits for it tries a new file
        lock.release()
        with suppress(OSError):  # there are shards in it, or another run begins
            path.parent.rmdir()


def split_by_key(catalogue: Catalogue, val_fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of the training and of the validation images, each in the order of the shards.

    The order is that of the hashes of the names, which mixes classes and depends on the names
    only. An image is for validation if the hash of its key lies below the fraction.
    """
    order = np.argsort(catalogue.names, kind="stable")
    is_val = catalogue.keys[order] < np.uint64(int(val_fraction * (2**64 - 1)))
    return order[~is_val], order[is_val]


def cut(sizes: np.ndarray, max_samples: int | None, max_bytes: int | None) -> list[int]:
    """Cut samples into shards of at most so many samples and bytes; a larger one gets its own.

    `sizes` int64 [n] are the bytes of each sample.

    Returns:
        The bounds, from 0 to n.
    """
    ends = np.cumsum(sizes)
    bounds = [0]
    while bounds[-1] < len(sizes):
        start = bounds[-1]
        stop = len(sizes) if max_samples is None else min(len(sizes), start + max_samples)
        if max_bytes is not None:
            before = int(ends[start - 1]) if start else 0
            stop = min(stop, int(np.searchsorted(ends, before + max_bytes, side="right")))
        bounds.append(max(stop, start + 1))
    return bounds


class ShardMaker:
    """Maker of any shard of the splits: a function of a job that every process can call."""

    def __init__(
        self, catalogue: Catalogue, work: Path, splits: Sequence[Split], recipe: Recipe
    ) -> None:
        self._catalogue, self._work, self._recipe = catalogue, work, recipe
        self._folders = {split.prefix: split.folder for split in splits}
        for split in splits:
            # Processes map the order rather than receive it.
            np.save(work / f"{split.prefix}.order.npy", split.images)

    def __call__(self, job: Job) -> Report:
        """Make the shard, unless it exists and matches its report."""
        return self._finished(job) or self._make(job)

    def _make(self, job: Job) -> Report:
        notes: Counter[str] = Counter()
        left_out: list[LeftOut] = []
        samples = self._samples(job, notes, left_out)
        first = next(samples, None)
        shard, index_digest = None, ""
        if first is not None:
            path = self._folders[job.split] / job.name
            shard = write_shard(path, chain([first], samples))
            index_digest = _digest_index(path)
        report = Report(
            split=job.split,
            number=job.number,
            images=job.stop - job.start,
            shard=shard,
            index_digest=index_digest,
            notes=dict(notes),
            left_out=tuple(left_out),
        )
        write_json(self._report_path(job), asdict(report))
        return report

    def _samples(
        self, job: Job, notes: Counter[str], left_out: list[LeftOut]
    ) -> Iterator[tuple[str, dict[str, bytes]]]:
        for index in _load_order(self._work / f"{job.split}.order.npy")[job.start : job.stop]:
            record = self._catalogue.record(int(index))
            try:
                sample = make_sample(self._catalogue, record, self._recipe)
            except Unfit as error:
                left_out.append(LeftOut(record.name, error.kind, error.reason))
                continue
            notes.update(sample.notes)
            yield key_of(record.name, bool(self._catalogue.ambiguous[index])), sample.files

    def _report_path(self, job: Job) -> Path:
        return self._work / f"{job.name}.json"

    def _finished(self, job: Job) -> Report | None:
        """The report of an earlier run if the shard still matches it, byte for byte."""
        path = self._report_path(job)
        if not path.exists():
            return None
        facts = json.loads(path.read_text())
        shard = None if facts["shard"] is None else Shard(**facts["shard"])
        if shard is not None and not self._is_whole(shard, job, facts["index_digest"]):
            return None
        left_out = tuple(LeftOut(**entry) for entry in facts["left_out"])
        return Report(**{**facts, "shard": shard, "left_out": left_out, "was_kept": True})

    def _is_whole(self, shard: Shard, job: Job, index_digest: str) -> bool:
        path = self._folders[job.split] / shard.name
        try:
            is_same = _digest_index(path) == index_digest
            return is_same and measure(path) == (shard.bytes, shard.xxh3_128)
        except FileNotFoundError:
            return False


def _digest_index(shard: Path) -> str:
    return xxhash.xxh3_128_hexdigest(shard.with_name(shard.name + IDX).read_bytes())


@lru_cache(maxsize=2)
def _load_order(path: Path) -> np.ndarray:
    return np.load(path, mmap_mode="r")


def run(
    maker: ShardMaker, jobs: Sequence[Job], workers: int, lock: Lock | None = None
) -> Iterator[Report]:
    """Do the jobs in this process or in several; yield reports in the order of completion.

    The workers hold `lock` as well, so that it outlives this process as long as any of them runs.
    """
    if workers == 1:
        yield from map(maker, jobs)
        return
    # A server that has imported everything forks the workers: they start at once, and unlike
    # ours its state is simple enough to be forked.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    _start_server()
    # Ignored if a script started this in the background: then Ctrl-C is meant for others.
    heeds = signal.getsignal(signal.SIGINT) != signal.SIG_IGN
    pool = ProcessPoolExecutor(workers, context, _start_worker, (maker, lock, heeds))
    try:
        futures = [pool.submit(_do, job) for job in jobs]
        for future in as_completed(futures):
            yield future.result()
    except BrokenProcessPool as error:
        raise UserError(
            "a worker process was killed, perhaps for lack of memory: run the same command again "
            "to resume; fewer --workers need less memory"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _start_server() -> None:
    """Start it with Ctrl-C ignored, which would interrupt its imports with a traceback."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        forkserver.ensure_running()
    finally:
        signal.signal(signal.SIGINT, before)


_maker: Callable[[Job], Report]


def _start_worker(maker: ShardMaker, _lock: Lock | None, heeds_ctrl_c: bool) -> None:
    global _maker
    _maker = maker
    if heeds_ctrl_c:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # ends it without a traceback
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """End this worker when its parent has died: nobody waits for its shard any more."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _do(job: Job) -> Report:
    return _maker(job)
