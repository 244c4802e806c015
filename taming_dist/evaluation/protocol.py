"""Under which conditions a figure was found: two figures of different ones do not compare."""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import taming_dist
from taming_dist.checkout import changed_files, commit_of

CENTRE, LANCZOS = "centre", "lanczos"


@dataclasses.dataclass(frozen=True)
class Protocol:
    """What a figure depends on beside the model.

    `images`, `reference_images`: how many were compared (0: statistics of an unknown number);
    `reference`: the fingerprint of the data set of the latter; `size`, `crop`, `filter`: how its
    images are prepared (None and empty: as they are); `dtype` of what is compared; `network`,
    `layer`: the digest of the weights of the network whose features these are of, and where in it
    they are (empty: of none); `class_counts`: of figures by class, which differ with the number of
    images, a digest of how many each class has (see `digest_of`).
    """

    images: int
    reference_images: int
    reference: str
    size: int | None
    crop: str
    filter: str
    dtype: str
    network: str = ""
    layer: str = ""
    class_counts: str = ""

    @property
    def hash(self) -> str:
        """Eight hex digits that differ where anything of it does."""
        return digest_of(self._facts())

    def record(self) -> dict[str, Any]:
        """For metrics.json."""
        return {"hash": self.hash} | self._facts()

    def _facts(self) -> dict[str, Any]:
        """All of it, but `class_counts` of figures by class only: others keep the hash that they
        had before there were such."""
        facts = dataclasses.asdict(self)
        if not self.class_counts:
            del facts["class_counts"]
        return facts


def digest_of(facts: Any) -> str:
    """Eight hex digits that differ where anything of what is JSON does."""
    text = json.dumps(facts, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


class Measured:
    """What an evaluation has found: `facts` of what was measured, and figures by name, each with
    its protocol."""

    def __init__(self, facts: Mapping[str, Any]) -> None:
        self.facts = dict(facts)
        self.figures: dict[str, Any] = {}
        self.notes: list[str] = []  # for the reader of `lines`
        self._names: dict[Protocol, list[str]] = {}

    def add(self, figures: Mapping[str, Any], protocol: Protocol) -> None:
        """Take in figures of one protocol."""
        self.figures |= figures
        self._names.setdefault(protocol, []).extend(figures)

    def protocol(self, name: str) -> Protocol:
        """That of a figure."""
        return next(protocol for protocol, names in self._names.items() if name in names)

    def record(self) -> dict[str, Any]:
        """For metrics.json: `protocols` lists each with the names of its figures."""
        listed = [protocol.record() | {"figures": names} for protocol, names in self._names.items()]
        code = {"version": taming_dist.__version__, "commit": commit()}
        return self.facts | code | self.figures | {"protocols": listed}

    def lines(self) -> list[str]:
        """A line for each fact and figure, with the hash of its protocol beside a figure; curves
        and tables are left to metrics.json."""
        said = [f"{name:24} {value}" for name, value in self.facts.items() if _is_short(value)]
        for name, value in self.figures.items():
            if _is_short(value):
                text = f"{value:.6g}" if isinstance(value, float) else str(value)
                said.append(f"{name:24} {text:12} protocol {self.protocol(name).hash}")
        return said + self.notes


def _is_short(value: Any) -> bool:
    return not isinstance(value, list | dict)


def commit() -> str | None:
    """The commit of this code, with `-dirty` if files of it were changed; None where it is not run
    from a checkout."""
    root = Path(__file__).resolve().parents[2]
    found = commit_of(root)
    return f"{found}-dirty" if found and changed_files(root) else found
