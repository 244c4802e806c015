"""Errors of Hydra and OmegaConf as one line that says what to type instead."""

import dataclasses
import difflib
import re
from collections.abc import Iterable, Iterator
from typing import Any, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError

from taming_dist.ranges import RANGE, kind_of

OVERRIDE = re.compile(r"(?:Error merging|Could not) override (?P<given>.*)", re.DOTALL)

# a key of an experiment that another member of a group does not have
EXPERIMENT = re.compile(r"In '(experiment/\S+)':.* not in '\w+'\s+full_key: (\S+)", re.DOTALL)


def explain(error: Exception) -> str:
    """Turn an error of Hydra or OmegaConf into one line: the key or value, and the fix."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    node, key = getattr(cause, "parent_node", None), getattr(cause, "key", None)
    hint = (below(node, key) or similar(node, key)) if isinstance(node, DictConfig) else ""
    match, experiment = OVERRIDE.match(str(error)), EXPERIMENT.match(str(error))
    if experiment:
        return (
            f"{experiment[1]} sets {experiment[2]}, which what you have chosen instead does not "
            f"have: leave the experiment's choice, or write one of your own (--config-dir)"
        )
    if match and isinstance(cause, ConfigKeyError | ConfigAttributeError):
        return f"there is no key {cause.full_key}{hint}"
    advice = instead(node, key, match["given"]) if match else ""
    if match and advice:
        return f"{match['given']}: {advice}"
    # Hydra's own line names the override that failed; the root cause names the key
    lines = [str(error)] if str(cause) in str(error) else [str(error), str(cause)]
    text = " ".join(" ".join(lines).split())
    text = re.sub(r" ?To append to your config use \+\S+", "", text)
    text = re.sub(r" (?:object|reference)_type=\S+| Config search path:.*", "", text)
    return text + hint


def similar(keys: Iterable[Any], key: Any) -> str:
    """ " (did you mean 'channels'?)", if one of the keys is like this one."""
    near = difflib.get_close_matches(str(key), map(str, keys), n=1)
    return f" (did you mean '{near[0]}'?)" if near and near[0] != key else ""


def below(node: DictConfig, key: Any) -> str:
    """The same for a key further down that has all words of this one: 'terms.l1.weight' for
    `l1_weight`."""
    words = set(str(key).split("_"))
    for path in paths(node):
        if "." in path and words <= set(re.split(r"[._]", path)):
            return f" (did you mean '{path}'?)"
    return ""


def paths(node: DictConfig) -> Iterator[str]:
    """The keys of all values below a node, such as 'terms.l1.weight'."""
    for key, value in node.items_ex(resolve=False):
        if isinstance(value, DictConfig) and not value._is_none() and not value._is_missing():
            yield from (f"{key!s}.{path}" for path in paths(value))
        else:
            yield str(key)


def instead(node: Any, key: Any, override: str) -> str:
    """What to use instead of a value of the wrong type for a field of a dataclass."""
    if override.startswith("~"):
        return "keys cannot be removed; give it a value, as in key=value"
    if isinstance(node, ListConfig):
        node, key = node._get_parent(), node._key()
    owner = None if node is None else OmegaConf.get_type(node)
    if owner is dict and dataclasses.is_dataclass(node._metadata.element_type):
        place = node._get_full_key(key)
        group = place.rpartition(".")[0].replace(".", "/")
        return f"set the keys in it, or choose another with {group}@{place}=NAME"
    if not dataclasses.is_dataclass(owner):
        return ""
    hint = get_type_hints(owner)[key]
    field = next(field for field in dataclasses.fields(owner) if field.name == key)
    kind = kind_of(hint)
    if RANGE in field.metadata and kind is not None:
        how = ", written [a,b]" if kind.is_list else ""
        return f"use {field.metadata[RANGE].words(kind)}{how}"
    if get_origin(hint) is list and hint != list[Any]:
        return "use a list, written [a,b]"
    if hint is bool:
        return "use true or false"
    if any(dataclasses.is_dataclass(kind) for kind in get_args(hint) or (hint,)):
        return f"{key} is a group of keys, set one by one as in {key}.KEY=value"
    return "give a value" if override.endswith("=null") else ""
