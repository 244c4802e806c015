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
from taming_dist.data.batching import BatchSizes, batch_sizes, check_shared
from taming_dist.data.codes import CodesConfig
from taming_dist.data.reader import ImagesConfig
from taming_dist.engine.settings import EngineConfig
from taming_dist.errors import UserError
from taming_dist.explaining import explain, similar
from taming_dist.models.discriminators import DISCRIMINATORS, DinoConfig
from taming_dist.models.modalities import MODALITIES, LabelMap
from taming_dist.models.prior.transformer import TransformerConfig
from taming_dist.models.quantizers import VARIANTS
from taming_dist.models.vqgan import VQGANConfig, check_size
from taming_dist.overrides import check_readable, kept_as_typed, parse, quoted
from taming_dist.pretrained import check_frozen_features
from taming_dist.ranges import LARGEST_SEED, check_ranges, ranged
from taming_dist.stages.label_maps import LabelMapLossConfig
from taming_dist.stages.prior import TokenLossConfig
from taming_dist.stages.vqgan import VQGANLossConfig
from taming_dist.training.loop import LoopConfig
from taming_dist.training.optimization import OptimConfig
from taming_dist.training.sinks import LogConfig

Schema = TypeVar("Schema")


@dataclasses.dataclass
class RunConfig:
    """`dir` is the run directory; starting again with the same one resumes the run. `init`: an
    export whose weights a new run starts from, instead of random ones."""

    name: str = MISSING
    dir: str = "outputs/${run.name}"
    seed: int = ranged(23, at_least=0, at_most=LARGEST_SEED)
    init: str = ""

    def __post_init__(self) -> None:
        check_ranges(self, "run")
        if ".." in Path(self.name).parts:
            raise UserError(f"run.name={self.name} leaves the folder of all runs: give run.dir=...")
        if not Path(self.name.strip("/")).parts:
            raise UserError(f"run.name={self.name} is not the name of a folder: give another")
        if not self.dir.strip() or not f"{self.name}{self.dir}".isprintable():
            raise UserError(f"run.dir={self.dir!r} is not a folder: give its path, or a run.name")


@dataclasses.dataclass
class Config:
    """All of `python -m taming_dist.train`. Stage 1 is a VQGANConfig with images, stage 2 a
    TransformerConfig with codes."""

    run: RunConfig = dataclasses.field(default_factory=RunConfig)
    train: LoopConfig = dataclasses.field(default_factory=LoopConfig)
    model: Any = MISSING
    loss: Any = MISSING
    data: Any = MISSING
    optim: OptimConfig = MISSING
    engine: EngineConfig = dataclasses.field(default_factory=EngineConfig)
    log: LogConfig = dataclasses.field(default_factory=LogConfig)
    scale: dict[str, Any] | None = None  # what +scale=NAME stands for, until it is known for which
    scaled: list[str] = dataclasses.field(default_factory=list)  # stage; then what it changes


# stage -> its model, loss and data
STAGES: dict[str, tuple[type, type, type]] = {
    "vqgan": (VQGANConfig, VQGANLossConfig, ImagesConfig),
    "label_maps": (VQGANConfig, LabelMapLossConfig, ImagesConfig),
    "transformer": (TransformerConfig, TokenLossConfig, CodesConfig),
}

# group -> name in conf/<group>/*.yaml -> dataclass
SCHEMAS: dict[str, dict[str, Any]] = {
    "model": {"vqgan_schema": VQGANConfig, "transformer_schema": TransformerConfig},
    "model/quantizer": {f"{name}_schema": variant[0] for name, variant in VARIANTS.items()},
    "model/modality": {f"{name}_schema": modality for name, modality in MODALITIES.items()},
    "loss": {
        "vqgan_schema": VQGANLossConfig,
        "labels_schema": LabelMapLossConfig,
        "tokens_schema": TokenLossConfig,
    },
    "loss/discriminator": {
        f"{name}_schema": variant[0] for name, variant in DISCRIMINATORS.items()
    },
    "data": {"images_schema": ImagesConfig, "codes_schema": CodesConfig},
}


def conf_dir() -> Path:
    """The folder of the YAML files: inside the package in a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    return package / "conf" if (package / "conf").is_dir() else package.parent / "conf"


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
            check_readable(override)
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
    model = OmegaConf.get_type(config.model)
    stage = next(name for name, parts in STAGES.items() if parts[0] is model)
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
    """Whether a key of a scale is for this configuration: another loss or discriminator, or none,
    has other keys than the one that is scaled."""
    parent, _, name = path.rpartition(".")
    node = OmegaConf.select(config, parent)
    return not parent.startswith("loss") or (node is not None and name in list(node))


def flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": [1, 2]}} -> {"a.b": [1, 2]}."""
    if not isinstance(values, dict):
        return {prefix: values}
    found: dict[str, Any] = {}
    for key, value in values.items():
        found |= flatten(value, f"{prefix}.{key}" if prefix else key)
    return found


def typed(config: DictConfig, schema: type[Schema]) -> Schema:
    """The composed configuration as its dataclass, `~` in its texts expanded; UserError for a
    missing or empty value or an unknown key."""
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

    Errors: UserError naming the keys, before any process group starts.
    """
    parts = (type(config.model), type(config.loss), type(config.data))
    if parts not in STAGES.values():
        raise UserError(
            f"model={type(config.model).__name__} does not go with "
            f"loss={type(config.loss).__name__} and data={type(config.data).__name__}: "
            f"choose model, loss and data of one stage, as the experiments do"
        )
    if isinstance(config.model, VQGANConfig):
        check_sizes(config)
    data: ImagesConfig | CodesConfig = config.data
    sizes = batch_sizes(data.global_batch, data.micro_batch, world_size)
    if isinstance(data, CodesConfig) or not data.streaming:
        check_shared("data.lanes", data.lanes, world_size)
    return sizes


def check_sizes(config: Config) -> None:
    """The image must halve down to whole codes and suit D; the modality must suit the loss."""
    check_size(config.data.size, config.model.factor, "data.size")
    modality = config.model.modality
    if isinstance(config.loss, LabelMapLossConfig) != isinstance(modality, LabelMap):
        raise UserError(
            f"model.modality={modality.name} does not go with loss={type(config.loss).__name__}: "
            f"label maps are trained with loss=labels, all else with loss=vqgan"
        )
    if isinstance(config.loss, LabelMapLossConfig):
        return
    if config.loss.discriminator is not None:
        config.loss.discriminator.check_size(config.data.size)
        check_frozen_features(config.loss.discriminator)
        if isinstance(config.loss.discriminator, DinoConfig) and modality.channels != 3:
            raise UserError(
                f"loss.discriminator=dino reads colours, and model.modality={modality.name} has "
                f"none: use loss/discriminator=patchgan"
            )
    if config.data.size < 16:
        raise UserError(f"data.size={config.data.size}: LPIPS needs at least 16 pixels")
