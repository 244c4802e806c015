"""How a command is configured: conf/*.yaml composed by Hydra, checked against typed dataclasses.

The dataclasses are owned by the parts that read them; here they are registered under the names that
the YAML files use, and every mistake becomes one line and exit code 2.
"""

import dataclasses
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import hydra
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import (
    InterpolationToMissingValueError,
    MissingMandatoryValue,
    OmegaConfBaseException,
)

from taming_dist import cli
from taming_dist.data.batching import BatchSizes
from taming_dist.errors import UserError
from taming_dist.explaining import explain, similar
from taming_dist.overrides import check_readable, kept_as_typed, parse, quoted
from taming_dist.stages import STAGES, stage_of
from taming_dist.stages.interface import Config
from taming_dist.usage import conf_dir

Schema = TypeVar("Schema")


def hydra_entry(
    config_name: str,
    schema: type[Schema],
    main: Callable[[Schema], None],
    groups: Mapping[str, Mapping[str, Any]] | None = None,
    folder: Path | None = None,
) -> None:
    """Compose <config_name>.yaml with the command line, check it, and call `main` with it.

    `schema` is the dataclass of the whole configuration; the YAML file, in `folder` (conf/ unless
    given), lists `<config_name>_schema` first in its defaults; `groups` are the dataclasses of its
    config groups. Mistakes of the user end in one line on stderr and exit code 2.
    """
    store = ConfigStore.instance()
    store.store(name=f"{config_name}_schema", node=schema)
    for group, schemas in (groups or {}).items():
        for name, node in schemas.items():
            store.store(group=group, name=name, node=node)
    path = str(folder or conf_dir())
    with one_line():
        line = parse(sys.argv[1:])
        overrides = [kept_as_typed(override, schema, groups or {}) for override in line.overrides]
        for override in overrides:
            check_readable(override, Path(path))
        if line.config_dir:
            overrides.append(search_path(Path(line.config_dir)))
        if any(override.startswith("+scale=") for override in overrides):
            with hydra.initialize_config_dir(path, version_base="1.3"):
                overrides = scaled(hydra.compose(config_name, overrides), overrides)
        if line.shows:
            show(path, config_name, [*overrides, *line.options])
            return
        with hydra.initialize_config_dir(path, version_base="1.3"):
            config = hydra.compose(config_name, overrides)
        main(typed(config, schema))


def search_path(folder: Path) -> str:
    """The override by which Hydra looks for groups in a folder of the user's, too."""
    if not folder.is_dir():
        raise UserError(f"--config-dir {folder}: there is no such folder")
    place = f"file://{folder.absolute()}"  # not as_uri: Hydra takes %20 as it is
    return f"hydra.searchpath=[{quoted(place)}]"


def show(folder: str, config_name: str, argv: Sequence[str]) -> None:
    """Have Hydra do what its own options ask for, such as --cfg job."""
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors come to us instead of its printer
    before, sys.argv = sys.argv, [sys.argv[0], *argv]
    try:
        hydra.main(version_base="1.3", config_path=folder, config_name=config_name)(print)()
    finally:
        sys.argv = before


@contextmanager
def one_line() -> Iterator[None]:
    """Mistakes of the user, in the configuration or in what it names, end in one line, exit 2."""
    with cli.one_line():
        try:
            yield
        except (HydraException, OmegaConfBaseException) as error:
            raise UserError(explain(error)) from error


def scaled(config: DictConfig, overrides: list[str]) -> list[str]:
    """The overrides with the values of +scale=NAME, composed as `config`, in place of its name.

    They depend on the stage, which Hydra knows only after composing. What is typed wins over them,
    wherever it stands. `scaled` of the result tells what they change.
    """
    model = OmegaConf.get_type(config.model) or object
    stage = next(name for name, stage in STAGES.items() if issubclass(model, stage.model))
    known = OmegaConf.to_container(config.scale)
    assert isinstance(known, dict)
    values = flatten(OmegaConf.to_container(OmegaConf.merge(known["all"], known[stage])))
    others = [override for override in overrides if not override.startswith("+scale=")]
    given = typed_keys(config, others)
    changes = []
    for key, value in values.items():
        parents = {key[:end] for end, letter in enumerate(key + ".") if letter == "."}
        before = json.dumps(_plain(OmegaConf.select(config, key)))
        if parents & given or before == json.dumps(value) or not applies(config, key):
            continue
        others.append(f"{key}={json.dumps(value)}")
        changes.append(f"{key}: {before} -> {json.dumps(value)}")
    return [*others, f"scaled=[{','.join(map(quoted, changes))}]"]


def typed_keys(config: DictConfig, overrides: Sequence[str]) -> set[str]:
    """The keys that the overrides give a value; what a group is chosen for (model=gpt) is none."""
    given = set()
    for override in overrides:
        name, _, value = override.partition("=")
        key = name.lstrip("+")
        if value.startswith("{") or not is_branch(OmegaConf.select(config, key)):
            given.add(key)
    return given


def _plain(value: Any) -> Any:
    return OmegaConf.to_container(value) if OmegaConf.is_config(value) else value


def applies(config: DictConfig, path: str) -> bool:
    """Whether a key of a scale is for this configuration: another loss, discriminator, network or
    condition, or none, has other keys than the one that is scaled."""
    parent, _, name = path.rpartition(".")
    node = OmegaConf.select(config, parent)
    varies = parent.startswith(("loss", "model"))
    return not varies or (node is not None and name in list(node))


def flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": [1, 2]}} -> {"a.b": [1, 2]}."""
    if not isinstance(values, dict):
        return {prefix: values}
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flatten(value, f"{prefix}.{key}" if prefix else key)
    return found


def typed(config: DictConfig, schema: type[Schema]) -> Schema:
    """The composed configuration as its dataclass, `~` in its texts expanded.

    Raises:
        UserError: a missing or empty value or an unknown key.
    """
    refuse_unknown_keys(config)
    refuse_empty(config)
    expand_home(config)
    try:
        values = OmegaConf.to_object(config)
    except (MissingMandatoryValue, InterpolationToMissingValueError) as error:
        raise UserError(_missing(config, error)) from error
    assert isinstance(values, schema)
    return values


def is_branch(node: Any, kind: Any = DictConfig) -> bool:
    """Whether a node of the configuration has others below it: none has `???` or null."""
    return isinstance(node, kind) and not node._is_missing() and not node._is_none()


def refuse_unknown_keys(config: DictConfig) -> None:
    """A key written with a plus (`+data.sise=64`) is added even where no dataclass has it."""
    kind = OmegaConf.get_type(config)
    fields = getattr(kind, "__dataclass_fields__", None)  # of a plain mapping all keys are fine
    for key, value in config.items_ex(resolve=False):
        if fields is not None and key not in fields:
            raise UserError(f"there is no key {config._get_full_key(key)}{similar(fields, key)}")
        if is_branch(value):
            refuse_unknown_keys(value)


def refuse_empty(config: DictConfig) -> None:
    """A name or path that has to be given may not be empty (`run.name=`)."""
    kind = OmegaConf.get_type(config)
    if not dataclasses.is_dataclass(kind):
        return
    for field in dataclasses.fields(kind):
        value: Any = config._get_node(field.name)
        if is_branch(value):
            refuse_empty(value)
        elif field.default == MISSING and str(value).strip() == "":
            raise UserError(f"{config._get_full_key(field.name)} is empty: give a value")


def expand_home(config: DictConfig | ListConfig) -> None:
    """`~` at the start of a text is the home folder, as in a shell."""
    keys = list(config) if isinstance(config, DictConfig) else range(len(config))
    for key in keys:
        value: Any = config._get_node(key)
        if is_branch(value, DictConfig | ListConfig):
            expand_home(value)
        elif isinstance(text := value._value(), str) and text.startswith("~"):
            config[key] = os.path.expanduser(text)


def _missing(config: DictConfig, error: OmegaConfBaseException) -> str:
    keys = missing_keys(config)
    if not keys:
        return explain(error)
    plural = "values are" if len(keys) > 1 else "value is"
    return f"{len(keys)} {plural} missing: give {' '.join(f'{key}=...' for key in keys)}"


def missing_keys(config: DictConfig) -> list[str]:
    """The keys without a value. (OmegaConf's own stumbles over what refers to one of them.)"""
    keys = []
    for key, value in config.items_ex(resolve=False):
        assert isinstance(key, str)
        if is_branch(value):
            keys += missing_keys(value)
        elif OmegaConf.is_missing(config, key) and not OmegaConf.is_interpolation(config, key):
            keys.append(config._get_full_key(key))
    return sorted(keys)


def to_yaml(config: Any) -> str:
    """A typed configuration as YAML text, resolved: what run.dir/config.yaml holds."""
    return OmegaConf.to_yaml(OmegaConf.structured(config), resolve=True)


def check(config: Config, world_size: int) -> BatchSizes:
    """Check what no part can check alone; gives the cut of the global batch.

    Raises:
        UserError: names the keys, before any process group starts.
    """
    stage = stage_of(config)
    stage.check_freeze(config)
    stage.check(config)
    return config.data.batch_sizes(world_size)
