"""meta.json, which makes a checkpoint of a folder: what the other files should be, and the state.

It has a checksum of its own contents, so that no flipped bit of it passes for another state.
"""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import xxhash

from taming_dist.engine.written import Written, write_file

FILE = "meta.json"
FORMAT, FORMER = "taming_dist.checkpoint.v2", "taming_dist.checkpoint.v1"
CHECKSUM = "xxh3_128"


@dataclasses.dataclass(frozen=True)
class Meta:
    """What a checkpoint knows of itself.

    `kept_for_good`: whether it is never deleted; None in those of before, which have not noted it.
    `state` is plain JSON. `files`: by path inside the folder. `model`: the config.json of what the
    run exports, whose tensors are those of the engine `exported`; empty in those of before.
    """

    step: int
    world_size: int
    state: dict[str, Any]
    files: dict[str, Written] = dataclasses.field(default_factory=dict)
    kept_for_good: bool | None = None
    exported: str = ""
    model: dict[str, Any] = dataclasses.field(default_factory=dict)
    format: str = FORMAT


KNOWN = {CHECKSUM, *(field.name for field in dataclasses.fields(Meta))}


def write_meta(folder: Path, meta: Meta) -> None:
    """Write meta.json into a folder, whole or not at all."""
    values = dataclasses.asdict(meta)
    values["files"] = dict(sorted(values["files"].items()))
    text = json.dumps(values | {CHECKSUM: checksum(values)}, indent=1, allow_nan=False)
    unfinished = folder / f"{FILE}.tmp"
    write_file(unfinished, [text.encode()])
    os.replace(unfinished, folder / FILE)


def read_meta(folder: Path) -> Meta:
    """The meta.json of a checkpoint folder.

    Raises:
        OSError: it cannot be read.
        ValueError: it is damaged.
    """
    try:
        values = json.loads((folder / FILE).read_bytes())
        if not set(values) <= KNOWN:
            raise ValueError("unknown keys")
        claimed = values.pop(CHECKSUM, None)  # those of before have none
        if claimed not in (None, checksum(values)):
            raise ValueError("its checksum is another")
        files = {name: _written(facts) for name, facts in values.pop("files").items()}
        meta = Meta(**values, files=files)
        if not (isinstance(meta.step, int) and isinstance(meta.state["images"], int)):
            raise ValueError("no numbers of steps and images")
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"not that of a checkpoint ({error!r})") from error
    return meta


def checksum(values: dict[str, Any]) -> str:
    """xxh3 of the values of a meta.json."""
    canonical = json.dumps(values, sort_keys=True, separators=(",", ":"))
    return xxhash.xxh3_128_hexdigest(canonical.encode())


def _written(facts: Any) -> Written:
    """What is known of a file; of one of before the size alone."""
    return Written(**facts) if isinstance(facts, dict) else Written(int(facts))
