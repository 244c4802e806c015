"""A member of a config group from what names it: `model/block=gpt`, config.json, or Python."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar

from omegaconf import MISSING

from taming_dist.errors import UserError

Config = TypeVar("Config")


def configs(registry: Mapping[str, tuple[type[Config], Any]]) -> dict[str, type[Config]]:
    """Return the config classes by name of a registry that has with each what it configures."""
    return {name: config for name, (config, _) in registry.items()}


def chosen(members: Mapping[str, type[Config]], value: Any, key: str) -> Config:
    """Return the config that `value` stands for, of the config classes `members` by name.

    `value` is a config already, its plain values with a `name` (config.json), its name alone (then
    it has its defaults), or `MISSING` (then it is the first of the members).

    Raises:
        UserError: there is no such member; the line starts with `key`.
    """
    if value == MISSING:
        value = next(iter(members))
    values = {"name": value} if isinstance(value, str) else value
    if not isinstance(values, Mapping):
        return value
    name = values.get("name")
    if not isinstance(name, str) or name not in members:
        raise UserError(f"{key}={name}: use one of {', '.join(members)}")
    keys = [field.name for field in dataclasses.fields(members[name])]  # type: ignore[arg-type]
    for unknown in sorted(values.keys() - set(keys)):
        raise UserError(f"{key}: {name} has no key {unknown}, use {', '.join(keys)}")
    return members[name](**values)
