"""What a command reads and makes, as W&B's artifacts tell it: data sets, exports, samples.

An artifact is known by its fingerprint and holds little, a description and small files: those that
made something and those that read it write the same bytes, and W&B joins them by these. Nothing has
to be looked up there, so that lineage works offline.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LARGEST_FILE = 2**24  # bytes; a longer manifest is left where it lies
TYPES = {"vqgan": "model", "transformer": "model"}  # of the rest: dataset
SHOWN = 12  # letters of a fingerprint


@dataclass(frozen=True)
class Artifact:
    """Something with a `fingerprint` (hex) of a `kind`: images, codes, vqgan, transformer, samples.

    `facts`: what else there is to say, where it lies and how large it is; they may differ from
    machine to machine. `files`: small ones that tell what it is; `weights`: the large one of an
    export.
    """

    kind: str
    fingerprint: str
    facts: Mapping[str, Any]
    files: tuple[Path, ...] = field(default=())
    weights: Path | None = None

    @property
    def name(self) -> str:
        """Its name at W&B."""
        return f"{self.kind}-{self.fingerprint[:SHOWN]}"

    @property
    def type(self) -> str:
        """Its type there."""
        return TYPES.get(self.kind, "dataset")

    @property
    def description(self) -> str:
        """The JSON that identifies it, the same for all who know it."""
        facts = {"kind": self.kind, "fingerprint": self.fingerprint}
        return json.dumps(facts, indent=1, allow_nan=False) + "\n"

    @property
    def small_files(self) -> tuple[Path, ...]:
        """Those of its files that are there and not too long."""
        return tuple(
            file for file in self.files if file.is_file() and file.stat().st_size <= LARGEST_FILE
        )


Describe = Callable[[], Artifact]  # reads files, so it is called where nobody waits for it
