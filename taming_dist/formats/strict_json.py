"""JSON that every parser can read, which Python's own writer does not guarantee."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from taming_dist.atomic import write_bytes
from taming_dist.errors import UserError
from taming_dist.formats.names import printable


def write_json(path: Path, record: Any, writer: str = "") -> None:
    """Write the JSON-safe part of a record (see `json_safe`) atomically."""
    text = json.dumps(json_safe(record), indent=1, allow_nan=False)
    write_bytes(path, f"{text}\n".encode(), writer)


def read_json(path: str | Path) -> Any:
    """Return what a JSON file of the user holds.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return json.loads(Path(path).read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}), give another file") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from error


def json_lines(path: Path) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """Each line of a file of JSON lines that a run has written, and what it says; None where it is
    torn by a crash, or damaged: it has no whole number of `samples`."""
    for line in path.read_bytes().splitlines():
        try:
            values = json.loads(line)
            is_record = isinstance(values["samples"], int)
        except (ValueError, KeyError, TypeError, RecursionError):
            is_record = False
        yield line, values if is_record else None


def json_safe(value: Any) -> Any:
    """The part of a value that every JSON parser can read.

    NaN and infinities, which Python writes although JSON has none, are dropped from objects and
    become null in lists; in strings, bytes that are not UTF-8 become `\\xNN`.
    """
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, dict):
        return {
            json_safe(name): json_safe(own)
            for name, own in value.items()
            if not (isinstance(own, float) and not math.isfinite(own))
        }
    if isinstance(value, list | tuple):
        return [json_safe(own) for own in value]
    return value
