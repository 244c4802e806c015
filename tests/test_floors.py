"""What import-linter cannot say: which module alone imports a library; what lies inside torch;
how long modules are and what packages say of themselves; that it knows every one of them."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from importlinter.api import read_configuration

PACKAGE = Path(__file__).resolve().parent.parent / "taming_dist"
MODULES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))
PURE = [name for name in MODULES if name.startswith(("models/", "losses/"))]
HOMES = {"deepspeed": "engine/start.py", "wandb": "training/wandb_sink.py"}


def imported(path: Path) -> set[str]:
    return set(_names(ast.parse(path.read_text())))


def _names(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield str(node.module)
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("name", PURE)
def test_models_and_losses_import_no_collectives_and_no_paths(name: str) -> None:
    assert not imported(PACKAGE / name) & {"torch.distributed", "pathlib", "logging"}


@pytest.mark.parametrize(("library", "home"), HOMES.items())
def test_only_one_module_imports_a_library_that_has_a_home(library: str, home: str) -> None:
    def uses(name: str) -> bool:
        return any(each.split(".")[0] == library for each in imported(PACKAGE / name))

    assert [name for name in MODULES if uses(name)] == [home]


def test_the_modules_in_subfolders_are_among_those_that_are_looked_at() -> None:
    assert {"models/quantizers/vector.py", "models/prior/transformer.py"} <= set(PURE)


@pytest.mark.parametrize(
    "line", ["from torch import distributed", "import torch.distributed", "import wandb.sdk"]
)
def test_a_module_that_does_would_be_caught(line: str, tmp_path: Path) -> None:
    module = tmp_path / "module.py"
    module.write_text(f"def late():\n    {line}\n")
    assert imported(module) & {"torch.distributed", "wandb.sdk"}


def test_no_module_is_longer_than_a_reader_can_hold() -> None:
    lengths = {name: len((PACKAGE / name).read_text().splitlines()) for name in MODULES}
    assert not [name for name, lines in lengths.items() if lines > 400]


@pytest.mark.parametrize("name", [name for name in MODULES if name.endswith("__init__.py")])
def test_every_package_says_what_it_is_in_its_first_line(name: str) -> None:
    docstring = ast.get_docstring(ast.parse((PACKAGE / name).read_text()))
    assert docstring
    assert docstring.splitlines()[0].endswith((".", ";", ":"))
    if name.split("/")[0] in ("data", "formats", "prepare") and name.count("/") == 1:
        assert len(docstring.splitlines()) == 1


def test_import_linter_knows_every_package_and_leaves_none_out() -> None:
    contracts = read_configuration(str(PACKAGE.parent / "pyproject.toml"))["contracts_options"]
    floors = contracts[0]
    assert floors["exhaustive"]
    assert "exhaustive_ignores" not in floors
    assert not any("ignore_imports" in contract for contract in contracts)
    named = {name.strip() for layer in floors["layers"] for name in layer.split("|")}
    there = {name.split("/")[0].removesuffix(".py") for name in MODULES} - {"__init__"}
    assert named == there
