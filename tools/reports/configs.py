"""The configurations of runs side by side, with their differences marked."""

from collections.abc import Sequence
from typing import Any

from reports.html import cells, table
from reports.reading import RunRecord

ABSENT = object()  # the key is not there, which is not the same as null


def keys_of(runs: Sequence[RunRecord]) -> dict[str, set[int]]:
    """All keys in their order, and the numbers of the runs that have another value than the first;
    runs without a configuration that can be read do not count."""
    known = [run for run in runs if run.config]
    found: dict[str, set[int]] = {}
    for key in dict.fromkeys(key for run in known for key in run.config):
        first = known[0].config.get(key, ABSENT)
        found[key] = {run.number for run in known if not same(first, run.config.get(key, ABSENT))}
    return found


def same(one: Any, other: Any) -> bool:
    """Whether two values of a configuration are the same: true is not 1, 1 is 1.0."""
    return isinstance(one, bool) == isinstance(other, bool) and one == other


def shown(value: Any) -> str:
    """A value as it would be typed."""
    if value is ABSENT:
        return "\N{EM DASH}"
    if value is None or isinstance(value, bool):
        return str(value).lower().replace("none", "null")
    return str(value)


def config_tables(runs: Sequence[RunRecord]) -> str:
    """The keys in which runs differ, and all of them on a click."""
    found = keys_of(runs)
    if not found:
        return ""
    rows = {
        key: cells(key, ((run, shown(run.config.get(key, ABSENT))) for run in runs), others)
        for key, others in found.items()
    }
    differing = [rows[key] for key, others in found.items() if others]
    parts = []
    if differing:
        parts.append(table("Keys in which the configurations differ", runs, differing, "key"))
    elif len(runs) > 1:
        parts.append("<p>The configurations are the same.</p>")
    whole = table("All keys of the configurations", runs, list(rows.values()), "key")
    parts.append(f"<details><summary>All {len(rows)} keys</summary>{whole}</details>")
    return f"<div class=keys-of>{''.join(parts)}</div>"
