"""Which shards are finished: a record for each beside the shards, and how shards are published.

A shard is written under a temporary name and linked into place, so it is always complete, and the
first one wins. Its record follows; if a worker dies in between, it is recreated from the shard.
"""

import errno
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from taming_dist.errors import UserError
from taming_dist.formats.code_shards import (
    CodeShard,
    entry_of,
    open_verified,
    write_codes_manifest,
)
from taming_dist.formats.manifest import CODES_FORMATS, MANIFEST, Manifest, Shard
from taming_dist.formats.strict_json import write_json
from taming_dist.prepare.tokenization.job import Job, Part

RECORDS = ".parts"
NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)


class Ledger:
    """The finished shards of a job as known to `worker`."""

    def __init__(self, job: Job, worker: str) -> None:
        self.job, self.worker = job, worker
        self.folder = job.out / RECORDS
        self.entries: dict[str, Shard] = {}

    def check(self, mine: list[Part]) -> None:
        """Check what exists before anything is written.

        The shards of the parts `mine` are read in full, and deleted if they are damaged: together
        the workers check every shard left by an earlier run.

        Raises:
            UserError: it is another job's.
        """
        job = self.job
        if job.out.exists() and not job.out.is_dir():
            raise UserError(f"--out {job.out} is a file: give a folder")
        if (job.out / MANIFEST).exists():
            manifest = Manifest.load(job.out)
            if manifest.format not in CODES_FORMATS:
                raise UserError(
                    f"--out {job.out} holds {manifest.format} shards: choose another --out"
                )
        expected = {part.path: part for part in job.parts}
        for path in sorted(job.out.glob("*.tar")):
            if path not in expected:
                raise UserError(
                    f"--out {job.out} holds {path.name} from another job: choose another --out, or "
                    f"delete that folder and run this command again"
                )
            record = self._read_record(expected[path]) or self._read_shard(expected[path])
            if record is not None:
                job.is_of(expected[path], record["facts"])
        self.unfinished()
        for part in mine:
            entry = self.entries.get(part.path.name)
            if entry is not None and not self._is_whole(part, entry):
                self._discard(part)

    def unfinished(self) -> list[Part]:
        """The parts that are not finished yet."""
        there = set(os.listdir(self.job.out)) if self.job.out.exists() else set()
        return [
            part
            for part in self.job.parts
            if part.path.name not in self.entries
            and not (part.path.name in there and self.is_finished(part))
        ]

    def publish(self, part: Part, shard: CodeShard) -> None:
        """Put a shard in place, unless another worker was faster, and record it."""
        temporary = part.path.with_name(f"{part.path.name}.{self.worker}.tmp")
        try:
            with open(temporary, "wb") as file:
                entry = shard.write(file, part.path.name)
                file.flush()
                os.fsync(file.fileno())
            if _link_first(temporary, part.path):
                self._record(part, entry, shard.facts)
            else:
                self.is_finished(part)
        finally:
            temporary.unlink(missing_ok=True)

    def open_for_work(self) -> None:
        """Make the folders, and remove the manifest of fewer shards: a manifest means complete."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.unfinished():
            (self.job.out / MANIFEST).unlink(missing_ok=True)

    def write_manifest(self) -> Manifest:
        """Write the manifest of the finished shards."""
        names = [part.path.name for part in self.job.parts]
        dataset = self.job.dataset
        return write_codes_manifest(
            self.job.out,
            names,
            dataset.classes,
            self.worker,
            known=self.entries,
            source_fingerprint=dataset.fingerprint,
        )

    def remove_leftovers(self, older_than_s: float) -> None:
        """Delete half-written files of killed workers."""
        probe = self.folder / f"{self.worker}.clock"
        probe.touch()
        now = probe.stat().st_mtime
        probe.unlink()
        for folder in (self.job.out, self.folder):
            for path in folder.glob("*.tmp"):
                try:
                    if now - path.stat().st_mtime > older_than_s:
                        path.unlink()
                except FileNotFoundError:
                    continue

    def is_finished(self, part: Part) -> bool:
        """Whether the shard exists; enter it if so. A damaged or incomplete one is deleted."""
        try:
            size = part.path.stat().st_size
        except FileNotFoundError:
            return False
        known = self._read_record(part)
        record = known or self._read_shard(part)
        if (
            record is None
            or record["entry"]["bytes"] != size
            or not self.job.is_of(part, record["facts"])
        ):
            self._discard(part)
            return False
        entry = Shard(**record["entry"])
        if known is None:
            self._record(part, entry, record["facts"])
        self.entries[part.path.name] = entry
        return True

    def _read_record(self, part: Part) -> dict[str, Any] | None:
        try:
            record = json.loads((self.folder / f"{part.name}.json").read_text())
            Shard(**record["entry"])
            source = record["facts"]["source"]
            is_complete = len(source["range"]) == 2 and "fingerprint" in source
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None
        return record if is_complete else None

    def _read_shard(self, part: Part) -> dict[str, Any] | None:
        """Make the record of a shard that has none, reading all of it; None if it is damaged."""
        try:
            shard = CodeShard.open(part.path)
            entry = entry_of(part.path, shard)
            open_verified(part.path, entry)
        except UserError as damage:
            print(f"{damage}; making it again", flush=True)
            return None
        return _record_of(entry, shard.facts)

    def _is_whole(self, part: Part, entry: Shard) -> bool:
        try:
            open_verified(part.path, entry)
        except UserError as damage:
            print(f"{damage}; making it again", flush=True)
            return False
        return True

    def _record(self, part: Part, entry: Shard, facts: dict[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{part.name}.json"
        write_json(path, _record_of(entry, facts), self.worker)
        self.entries[part.path.name] = entry

    def _discard(self, part: Part) -> None:
        self.entries.pop(part.path.name, None)
        (self.job.out / MANIFEST).unlink(missing_ok=True)
        part.path.unlink(missing_ok=True)
        (self.folder / f"{part.name}.json").unlink(missing_ok=True)


def _record_of(entry: Shard, facts: dict[str, Any]) -> dict[str, Any]:
    known = ("tokenizer", "condition", "text", "vocab", "preprocessing", "source")
    return {"entry": asdict(entry), "facts": {name: facts[name] for name in known if name in facts}}


def _link_first(temporary: Path, path: Path) -> bool:
    """Give a complete file its name unless that is taken; returns whether it was free."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        os.replace(temporary, path)  # the last one wins; its bytes are the same
    return True
