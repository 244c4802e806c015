"""The keys of a transformer before its parts had configs of their own, in both directions.

Exports, and config.yaml of runs, once had `condition: class` with `classes`, `condition_grid`,
`condition_vocabulary` and `condition_fingerprint` beside it, and neither a block, an order nor a
scheme. Exports still have these keys where they say all, so that their fingerprints stay.
"""

from collections.abc import Mapping
from typing import Any

# key then -> the condition that it is of, its key there now, what it is with another condition
CONDITION_KEYS: dict[str, tuple[str, str, Any]] = {
    "classes": ("class", "classes", 0),
    "condition_vocabulary": ("codes", "vocabulary", 0),
    "condition_grid": ("codes", "grid", []),
    "condition_fingerprint": ("codes", "fingerprint", ""),
}
CONDITIONS = ("none", "class", "codes")  # that there were then
PARTS = {"block": "gpt", "order": "raster", "scheme": "next_index"}  # what there was then


def present(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the plain values of a config, former or present, under the present keys."""
    parts = {part: {"name": name} for part, name in PARTS.items()}
    condition = values.get("condition", "none")
    if not isinstance(condition, str):
        return parts | dict(values)
    own = {
        key: values[former]
        for former, (name, key, _) in CONDITION_KEYS.items()
        if name == condition and former in values
    }
    kept = {key: value for key, value in values.items() if key not in CONDITION_KEYS}
    return parts | kept | {"condition": {**own, "name": condition}}


def former(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the plain values of a config under the former keys, if its condition had them."""
    condition = values["condition"]
    if condition["name"] not in CONDITIONS:
        return dict(values)
    flat = {
        key: condition[now] if condition["name"] == name else otherwise
        for key, (name, now, otherwise) in CONDITION_KEYS.items()
    }
    return dict(values) | {"condition": condition["name"]} | flat
