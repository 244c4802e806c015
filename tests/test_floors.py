"""What import-linter cannot say: modules inside torch that models and losses must not know."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "taming_dist"
PURE = sorted([*(PACKAGE / "models").glob("*.py"), *(PACKAGE / "losses").glob("*.py")])


def imported(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


@pytest.mark.parametrize("path", PURE, ids=lambda path: path.name)
def test_models_and_losses_import_no_collectives_and_no_paths(path: Path) -> None:
    forbidden = {"torch.distributed", "pathlib", "logging"}
    assert not imported(path) & forbidden


def test_a_module_that_does_would_be_caught(tmp_path: Path) -> None:
    module = tmp_path / "module.py"
    module.write_text("from torch import distributed\n")
    assert "torch.distributed" in imported(module)
