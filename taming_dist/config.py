"""How a command is configured: conf/*.yaml composed by Hydra, checked against typed dataclasses.

The dataclasses are owned by the parts that read them; here they are registered under the names that
the YAML files use, and every mistake becomes one line and exit code 2.
"""

import difflib
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import hydra
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from taming_dist import cli
from taming_dist.errors import UserError

Schema = TypeVar("Schema")


def conf_dir() -> Path:
    """The folder of the YAML files: inside the package in a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    return package / "conf" if (package / "conf").is_dir() else package.parent / "conf"


def hydra_entry(config_name: str, schema: type[Schema], main: Callable[[Schema], None]) -> None:
    """Compose conf/<config_name>.yaml with the command line, check it, and call `main` with it.

    `schema` is the dataclass of the whole configuration; the YAML file lists `<config_name>_schema`
    first in its defaults. Mistakes of the user end in one line on stderr and exit code 2.
    """
    ConfigStore.instance().store(name=f"{config_name}_schema", node=schema)
    os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # errors come to us instead of Hydra's printer

    @hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=config_name)
    def entry(config: DictConfig) -> None:
        main(typed(config, schema))

    try:
        entry()
    except UserError as error:
        cli.fail(str(error))
    except (HydraException, OmegaConfBaseException) as error:
        cli.fail(explain(error))
    except PermissionError as error:
        cli.fail(f"no permission for {error.filename}: choose another folder (run.dir or out) "
                 f"or mend its permissions")


def typed(config: DictConfig, schema: type[Schema]) -> Schema:
    """The composed configuration as its dataclass; UserError for a missing value."""
    try:
        values = OmegaConf.to_object(config)
    except MissingMandatoryValue as error:
        raise UserError(_missing(config, error)) from error
    assert isinstance(values, schema)
    return values


def _missing(config: DictConfig, error: MissingMandatoryValue) -> str:
    keys = sorted(OmegaConf.missing_keys(config))
    if not keys:
        return explain(error)
    plural = "values are" if len(keys) > 1 else "value is"
    return f"{len(keys)} {plural} missing: give {' '.join(f'{key}=...' for key in keys)}"


def explain(error: Exception) -> str:
    """One line from an error of Hydra or OmegaConf, naming the key and the nearest existing one."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    # Hydra's own line names the override that failed; the root cause names the key
    lines = [str(error)] if str(cause) in str(error) else [str(error), str(cause)]
    text = " ".join(" ".join(lines).split())
    text = re.sub(r" ?To append to your config use \+\S+", "", text)
    text = re.sub(r" object_type=\w+", "", text)
    node, key = getattr(cause, "parent_node", None), getattr(cause, "key", None)
    if node is not None and isinstance(key, str) and isinstance(node, DictConfig):
        near = difflib.get_close_matches(key, [str(name) for name in node], n=1)
        if near and near[0] != key:
            text += f" (did you mean '{near[0]}'?)"
    return text


def to_yaml(config: Any) -> str:
    """A typed configuration as YAML text, resolved: what run.dir/config.yaml holds."""
    return OmegaConf.to_yaml(OmegaConf.structured(config), resolve=True)
