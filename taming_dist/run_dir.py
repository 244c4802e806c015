"""The run directory: what it must be for a run to start or to resume in it, and its first file."""

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from taming_dist.atomic import write_bytes
from taming_dist.config import to_yaml
from taming_dist.errors import UserError
from taming_dist.formats.files import writing
from taming_dist.models.answers import called, of_configs
from taming_dist.models.export import ModelConfig
from taming_dist.stages import schemas
from taming_dist.stages.interface import Config
from taming_dist.training.clock import Clock
from taming_dist.training.sinks import Sinks, open_sinks

# A network's config class by what it is called; those with a field `name` say it themselves.
KINDS: dict[str, Any] = {
    name.removesuffix("_schema"): config
    for group in ("model", "loss/discriminator")
    for name, config in schemas()[group].items()
}


class Difference(NamedTuple):
    """A key with its value in the run that is there and in the one that wants to resume it."""

    key: str
    before: Any
    now: Any


def check_run_dir(config: Config, run_dir: Path) -> None:
    """The run directory, or the folder it will be made in, must be writable, and what is in it must
    be a run that this one can resume. Nothing is made here: a refused start leaves nothing behind.
    """
    path = run_dir.absolute()
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    if not there.is_dir():
        raise UserError(f"run.dir={run_dir} is not a folder: choose another run.dir")
    if not os.access(there, os.W_OK):
        raise UserError(f"run.dir={run_dir}: no permission to write there; choose another run.dir")
    file = run_dir / "config.yaml"
    if not file.is_file():
        return
    found = next(differences(config, read_config(file)), None)
    if found is not None:
        raise UserError(
            f"run.dir={run_dir} holds a run with {found.key}={found.before}, and this one has "
            f"{found.now}: set it back, or choose another run.name"
        )


def read_config(file: Path) -> dict[str, Any]:
    """The config.yaml of an earlier start as plain values; UserError if it is damaged."""
    asides = {"scale", "scaled", "debug", "dry_run"}
    parts = {field.name for field in dataclasses.fields(Config)} - asides
    try:
        found = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        found, why = None, " ".join(str(error).split())
    else:
        why = "it is empty" if found is None else "it is not the configuration of a run"
    if not isinstance(found, dict) or not all(isinstance(found.get(part), dict) for part in parts):
        raise UserError(
            f"{file} is damaged ({why}): delete it if the run is the one that you mean to resume, "
            f"or choose another run.name"
        )
    return found


def differences(config: Config, before: dict[str, Any]) -> Iterator[Difference]:
    """What a checkpoint of the run `before` depends on and `config` has otherwise: all of its
    networks' configs, the kind of optimizer, and whether weights are averaged."""
    yield from differing("model", before["model"], config.model)
    if hasattr(config.loss, "discriminator"):
        held = before["loss"].get("discriminator")
        yield from differing("loss.discriminator", held, config.loss.discriminator)
    yield from differing("optim.name", before["optim"].get("name"), config.optim.name)
    held = before["optim"].get("ema_half_life", 0)
    yield from switched("optim.ema_half_life", held, config.optim.ema_half_life)
    has_null_prefix = getattr(config.model, "null_prefix", False)
    if hasattr(config.loss, "condition_dropout") and not has_null_prefix:
        # it has the model learn a prefix of its own
        held = before["loss"].get("condition_dropout", 0)
        yield from switched("loss.condition_dropout", held, config.loss.condition_dropout)


def switched(key: str, before: Any, now: Any) -> Iterator[Difference]:
    """The key if its value, for which 0 means off, was switched on or off."""
    if bool(before) != bool(now):
        yield Difference(key, before, now)


def differing(key: str, before: Any, now: Any) -> Iterator[Difference]:
    """Where the plain values `before` of a config class differ from the config `now`, key by key.

    A key that is younger than the run had the value that its class gives it. A field that is marked
    with `may_change`, such as the place of a file, does not count, nor one that is left to the data
    on either side (`from_data`).
    """
    if of_configs(now) and isinstance(before, list) and len(now) == len(before):
        for index, pair in enumerate(zip(before, now, strict=True)):
            yield from differing(f"{key}.{index}", *pair)
        return
    if not dataclasses.is_dataclass(now) or isinstance(now, type):
        if before != now:
            yield Difference(key, kind(before), kind(now))
        return
    if isinstance(now, ModelConfig) and isinstance(before, dict):
        before = now.present(before)
    fields = sorted(dataclasses.fields(now), key=lambda field: field.name != "name")
    if not isinstance(before, dict) or set(before) - {field.name for field in fields}:
        yield Difference(key, kind(before), kind(dataclasses.asdict(now)))
        return
    for field in fields:
        held = before[field.name] if field.name in before else default(field)
        value = getattr(now, field.name)
        is_open = field.metadata.get("from_data") and not (held and value)
        if not is_open and not field.metadata.get("may_change"):
            yield from differing(f"{key}.{field.name}", held, value)


def default(field: Any) -> Any:
    """The plain value that a config class gives a field."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return None if field.default is dataclasses.MISSING else field.default


def kind(value: Any) -> Any:
    """A value as the user knows it: the plain values of a config by the name of its class."""
    if isinstance(value, list):
        return [kind(each) for each in value]
    if dataclasses.is_dataclass(value):
        return called(value)
    if not isinstance(value, dict):
        return "null" if value is None else value
    names = (
        name
        for name, config in KINDS.items()
        if set(value) <= {field.name for field in dataclasses.fields(config)}
    )
    return value.get("name") or next(names, "another kind")


def first_rank_sinks(config: Config, clock: Clock, run_dir: Path) -> Sinks:
    """The sinks of rank 0, and config.yaml written."""
    with writing(run_dir):
        write_bytes(run_dir / "config.yaml", to_yaml(config).encode())
    return open_sinks(config.log, run_dir, config.run.name, clock, yaml.safe_load(to_yaml(config)))
