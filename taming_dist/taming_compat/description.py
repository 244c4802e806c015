"""What the original's YAML file says of a model: nested mappings, classes by their dotted names.

None of the classes is imported; an entry {"target": ..., "params": ...} stands for an object.
"""

from collections.abc import Mapping
from typing import Any

from taming_dist.errors import UserError

FIRST_STAGE_CONFIG, CONDITION_STAGE = "first_stage_config", "cond_stage_config"


def section(description: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return a mapping inside a description; empty if it is not there."""
    found = description.get(name) or {}
    if not isinstance(found, dict):
        raise UserError(f"{name} in the YAML file is no mapping: give the original's own file")
    return found


def params(description: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the parameters of an object inside a description; empty if it is not there."""
    found = description.get(name)
    return {} if isinstance(found, str) else section(section(description, name), "params")


def stage_description(description: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the parameters of a VQGAN inside a transformer's description; which column of a batch
    the condition's reads, only the transformer's own parameters say."""
    key = description.get("cond_stage_key") if name == CONDITION_STAGE else None
    return ({} if key is None else {"image_key": key}) | params(description, name)


def class_name(description: Mapping[str, Any], name: str) -> str | None:
    """Return the class of an object without its modules, or the word that stands for the object
    (such as __is_unconditional__); None if it is not there."""
    found = description.get(name)
    named = found.get("target") if isinstance(found, Mapping) else found
    return None if named is None else str(named).rpartition(".")[2]


def number(description: Mapping[str, Any], name: str, default: float) -> float:
    """Return a number of a description, or what the original takes without it."""
    found = description.get(name, default)
    if isinstance(found, bool) or not isinstance(found, int | float):
        raise UserError(f"{name} in the YAML file is {found!r}: give a number")
    return found


def check_said(found: Mapping[str, Any], said: Mapping[str, Any]) -> None:
    """Raise a UserError if the description says otherwise than the checkpoint."""
    for name, value in found.items():
        if name in said and said[name] != value:
            raise UserError(
                f"{name} is {said[name]} in the YAML file and {value} in the checkpoint: give the "
                f"YAML file of this very model"
            )


def instance(target: str, params: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entry of an object of the class `target`."""
    return {"target": target, "params": dict(params)}
