"""Preparing the command line for Hydra, so that text stays as it was typed.

Hydra's grammar reads `run.name=1e3` as a number and fails at `{`, `=`, `~` or a letter such as "e"
with an accent. The dataclasses determine which values are text; these are quoted here before Hydra
sees them. Values in Hydra's own quotes and `null` are left alone.
"""

import argparse
import dataclasses
import re
import shlex
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import HydraException

from taming_dist.errors import UserError

Groups = Mapping[str, Mapping[str, Any]]

OVERRIDE = re.compile(r"(\+{0,2})([\w./]+)=(.*)", re.DOTALL | re.ASCII)
QUOTED = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\"""", re.DOTALL)
NUMBER = re.compile(r"[-+]?[\d.][\d._]*(?:[eE][-+]?\d+)?")
MAPPING = re.compile(r"\{[^{},:]+:(?!//).*\}", re.DOTALL)
NOT_TAKEN = ("config_path", "config_name", "experimental_rerun")  # options of Hydra


@dataclasses.dataclass(frozen=True)
class CommandLine:
    """`overrides` as typed; `options`: Hydra's own (--cfg job), that is, everything else.

    `shows`: an option asks Hydra to print something instead of running.
    """

    overrides: list[str]
    options: list[str]
    config_dir: str | None
    shows: bool


def parse(argv: Sequence[str]) -> CommandLine:
    """Separate Hydra's options from the overrides; `UserError` for unknown or unsupported ones."""
    parser = get_args_parser()
    parser.exit_on_error = False
    try:
        known, others = parser.parse_known_args(list(argv))
    except argparse.ArgumentError as error:
        raise UserError(str(error)) from error
    unknown = [word for word in others if word.startswith("-")]
    if unknown:
        raise UserError(f"unknown option {unknown[0]}: settings are written key=value")
    if known.multirun:
        raise UserError(
            "one command is one run: omit -m (--multirun) and run one command for each set of "
            "values, each with its own run.name"
        )
    for option in NOT_TAKEN:
        if getattr(known, option) is not None:
            name = f"--{option.replace('_', '-')}"
            raise UserError(f"{name} is not supported: use --config-dir for your own experiments")
    overrides = [*known.overrides, *others]
    options = list(argv)
    for override in overrides:
        options.remove(override)
    shows = (known.cfg, known.info, known.help, known.hydra_help, known.shell_completion)
    return CommandLine(overrides, options, known.config_dir, any(shows))


def kept_as_typed(override: str, schema: type, groups: Groups) -> str:
    """The override with its value quoted if its key takes text or a shard spec in `schema`, whose
    config groups have the dataclasses `groups`."""
    match = OVERRIDE.fullmatch(override)
    if match is None:
        return override
    plus, key, value = match.groups()
    kinds = kinds_of(key, schema, groups)
    if any(dataclasses.is_dataclass(kind) for kind in kinds):  # the choice of a group
        return override
    if Any in kinds:
        return f"{plus}{key}={quoted_spec(value)}"
    if str in kinds:
        return f"{plus}{key}={quoted(value)}"
    return override


def kinds_of(key: str, schema: type, groups: Groups) -> set[Any]:
    """The types of a key in all variants of the groups that contain it, without Optional."""
    found: set[Any] = {schema}
    path: list[str] = []
    for name in key.split("."):
        if any(get_origin(kind) is dict for kind in found):  # of what its group has, by any name
            found = {kind for kind in found if dataclasses.is_dataclass(kind)}
            continue
        path.append(name)
        hints = [get_type_hints(owner) for owner in found if dataclasses.is_dataclass(owner)]
        found = {kind for hint in hints if name in hint for kind in alternatives(hint[name])}
        found |= set(groups.get("/".join(path), {}).values())
    return found


def alternatives(hint: Any) -> tuple[Any, ...]:
    """(a, b) of `a | b`, else the type itself."""
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def quoted(value: str, quote: Quote = Quote.single) -> str:
    """Text in Hydra's quotes, unless it is quoted already or null."""
    if value == "null" or QUOTED.fullmatch(value):
        return value
    return QuotedString(text=value, quote=quote).with_quotes()


def quoted_spec(value: str) -> str:
    """A shard spec with its text quoted: text, [a list of specs], or {name: spec, ...}."""
    if value.startswith("[") and value.endswith("]"):
        return f"[{','.join(quoted_spec(part) for part in split(value[1:-1]))}]"
    if MAPPING.fullmatch(value):
        pairs = [part.partition(":") for part in split(value[1:-1])]
        inside = ",".join(f"{name}:{quoted_item(item.strip())}" for name, _, item in pairs)
        return f"{{{inside}}}"
    return quoted(value)


def quoted_item(value: str) -> str:
    """A spec within a mapping, where numbers are weights."""
    return value if NUMBER.fullmatch(value) else quoted_spec(value)


def split(text: str) -> list[str]:
    """Split at the commas outside of brackets and quotes."""
    parts, depth, rest = [""], 0, text
    while rest:
        match = QUOTED.match(rest)
        token = match[0] if match else rest[0]
        rest = rest[len(token) :]
        depth += (token in "[{(") - (token in ")}]")
        if token == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += token
    return [part.strip() for part in parts if part.strip()]


def check_readable(override: str, conf: Path) -> None:
    """Raise `UserError` with the correct form unless Hydra reads the override as one value, and as
    a name where it chooses for a group, a folder of `conf`."""
    match = OVERRIDE.fullmatch(override)
    try:
        parsed = OverridesParser.create().parse_override(override)
    except HydraException as error:
        if match is None:
            raise UserError(f"cannot read {override!r}: settings are written key=value") from error
        raise UserError(
            f"cannot read the value of {match[2]} in {override!r}: lists are written [a,b], "
            f"mappings {{name:value}}; for text with special characters type "
            f"{as_text(*match.groups())}"
        ) from error
    chosen, group = parsed.value(), parsed.key_or_group
    if (conf / group).is_dir() and not (parsed.is_delete() or isinstance(chosen, str | list)):
        fix = (
            f"its keys are set one by one, {group.replace('/', '.')}.KEY=VALUE"
            if isinstance(chosen, dict)
            else f"to leave it out, where that can be, type ~{parsed.get_key_element()}"
        )
        raise UserError(f"{override!r}: {group}= chooses a name, as in conf/{group}; {fix}")
    if parsed.is_sweep_override() and match is not None:
        plus, key, value = match.groups()
        raise UserError(
            f"{override!r} gives several values, and one command is one run: for a list type "
            f"{shlex.quote(f'{plus}{key}=[{value}]')}, for text {as_text(plus, key, value)}"
        )


def as_text(plus: str, key: str, value: str) -> str:
    """The override as typed into a shell for its value to be text."""
    return shlex.quote(f"{plus}{key}={quoted(value, Quote.double)}")
