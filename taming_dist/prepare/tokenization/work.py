"""One worker: claims unfinished parts and encodes them until none is left."""

import time
from collections.abc import Iterator

from taming_dist.engine.claims import Claims
from taming_dist.engine.workers import Worker
from taming_dist.engine.world import choose_device
from taming_dist.errors import UserError
from taming_dist.formats.files import FIXES
from taming_dist.formats.manifest import Manifest
from taming_dist.prepare.tokenization.encoder import Encoder
from taming_dist.prepare.tokenization.job import Job, Part
from taming_dist.prepare.tokenization.ledger import RECORDS, Ledger
from taming_dist.prepare.tokenization.progress import Progress
from taming_dist.prepare.tokenization.report import REPORT, write_report

LOOK_AGAIN_S = 2.0


def tokenize(job: Job, worker: Worker, batch: int, threads: int, stale_s: float) -> None:
    """Work until every part is finished by any worker; the last worker completes the folder.

    Raises:
        UserError: the folder holds another job's shards, or the disk is full.
    """
    claims = Claims(job.out / RECORDS, stale_s)
    ledger = Ledger(job, claims.worker)
    ledger.check(job.parts[worker.number :: worker.count])
    if _is_complete(job, ledger):
        print(f"{worker.who}{job.out} is complete; nothing to do")
        return
    try:
        ledger.open_for_work()
        with claims:
            encoder = _work(job, ledger, claims, worker, batch, threads)
            _complete(job, ledger, claims, worker, encoder)
    except OSError as error:
        if error.errno not in FIXES:
            raise
        raise UserError(
            f"{job.out} cannot be written ({error.strerror}): {FIXES[error.errno]}, then run the "
            f"same command again; {len(ledger.entries)} finished shards are kept"
        ) from error


def _work(
    job: Job, ledger: Ledger, claims: Claims, worker: Worker, batch: int, threads: int
) -> Encoder:
    progress = Progress(worker.who, job.dataset.num_samples)
    encoder = Encoder(job, choose_device(worker.local_rank), batch, threads, progress)
    for part in _claimed(job, ledger, claims, worker, progress):
        ledger.publish(part, encoder.encode(part))
        claims.release(part.name)
    progress.report()
    return encoder


def _claimed(
    job: Job, ledger: Ledger, claims: Claims, worker: Worker, progress: Progress
) -> Iterator[Part]:
    """Yield the parts that this worker claims; end when all are finished.

    Parts claimed by others are waited for, and taken over if those workers die.
    """
    is_waiting = False
    while todo := ledger.unfinished():
        progress.finished(sum(p.stop - p.start for p in job.parts) - _images(todo))
        begin = worker.number * len(todo) // worker.count
        part = next((p for p in todo[begin:] + todo[:begin] if claims.take(p.name)), None)
        if part is None:
            if not is_waiting:
                print(f"{worker.who}waiting for {len(todo)} shards of other workers", flush=True)
            is_waiting = True
            time.sleep(min(LOOK_AGAIN_S, claims.stale_s / 2))
            continue
        is_waiting = False
        if not ledger.is_finished(part):
            yield part
        claims.release(part.name)


def _images(parts: list[Part]) -> int:
    return sum(part.stop - part.start for part in parts)


def _is_complete(job: Job, ledger: Ledger) -> bool:
    if ledger.unfinished() or not (job.out / REPORT).exists():
        return False
    try:
        manifest = Manifest.load(job.out)
    except UserError:
        return False  # it does not exist, or another worker has just removed an old one
    return manifest.shards == tuple(ledger.entries[part.path.name] for part in job.parts)


def _complete(job: Job, ledger: Ledger, claims: Claims, worker: Worker, encoder: Encoder) -> None:
    """Write the manifest and report, or wait until another worker has."""
    while not _is_complete(job, ledger):
        if not claims.take("manifest"):
            time.sleep(min(LOOK_AGAIN_S, claims.stale_s / 2))
            continue
        manifest = ledger.write_manifest()
        text = write_report(job, manifest, encoder)
        ledger.remove_leftovers(claims.stale_s)
        print(f"{worker.who}{text}", flush=True)
        claims.release("manifest")
