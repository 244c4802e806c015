"""Shapes in the signatures of models and losses: complete, checked by tests, absent at run time."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jaxtyping
import pytest
import torch

from taming_dist.models.modalities import RGB

PACKAGE = Path(__file__).resolve().parents[2] / "taming_dist"
# what holds tensors of several shapes
OPEN = {"Mapping", "dict", "Callable"}

WRONG = """
import sys, torch
from taming_dist.models.modalities import RGB
print(list(RGB().tensor(torch.zeros(5)).shape), "beartype" in sys.modules)
"""


def shapeless(source: str) -> list[str]:
    """Public functions that do not say what shape a tensor of their signature has."""
    return [name for name, hints in _public(ast.parse(source), "") if any(map(_bare, hints))]


def _public(tree: ast.AST, inside: str) -> Iterator[tuple[str, list[ast.expr]]]:
    for node in ast.iter_child_nodes(tree):
        name = inside + getattr(node, "name", "")
        if isinstance(node, ast.ClassDef):
            fields = [each.annotation for each in node.body if isinstance(each, ast.AnnAssign)]
            if any(ast.unparse(base) == "NamedTuple" for base in node.bases):
                yield name, fields
            yield from _public(node, f"{name}.")
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            given = node.args.args + node.args.kwonlyargs
            hints = [*(each.annotation for each in given), node.returns]
            yield name, [each for each in hints if each is not None]


def _bare(hint: ast.AST) -> bool:
    if isinstance(hint, ast.Subscript):
        if ast.unparse(hint.value) in OPEN | set(dir(jaxtyping)):
            return False
        return _bare(hint.slice)
    if isinstance(hint, ast.Name):
        return hint.id == "Tensor"
    return any(_bare(child) for child in ast.iter_child_nodes(hint))


@pytest.mark.parametrize(
    ("hint", "found"),
    [
        ("Tensor", True),
        ("Tensor | None", True),
        ("tuple[Tensor, int]", True),
        ("list[Tensor]", True),
        ('Float[Tensor, "b n"]', False),
        ('Sequence[Float[Tensor, "b n"]]', False),
        ("Mapping[str, Tensor]", False),
        ("int", False),
    ],
)
def test_a_signature_without_a_shape_is_found(hint: str, found: bool) -> None:
    assert bool(shapeless(f"def public(x: {hint}): ...")) == found
    assert bool(shapeless(f"class A:\n    def public(self) -> {hint}: ...")) == found
    assert bool(shapeless(f"class A(NamedTuple):\n    x: {hint}")) == found
    assert not shapeless(f"def _private(x: {hint}): ...")


@pytest.mark.parametrize("folder", ["models", "losses"])
def test_every_public_signature_says_what_shape_its_tensors_have(folder: str) -> None:
    for path in (PACKAGE / folder).rglob("*.py"):
        assert not shapeless(path.read_text()), path


def test_a_wrong_shape_and_a_wrong_type_are_caught_in_tests() -> None:
    with pytest.raises(jaxtyping.TypeCheckError, match="parameter 'column'"):
        RGB().tensor(torch.zeros(1, 4, 2, 2, dtype=torch.uint8))
    with pytest.raises(jaxtyping.TypeCheckError, match="parameter 'column'"):
        RGB().tensor(torch.zeros(1, 3, 2, 2))


def test_outside_of_tests_nothing_is_checked() -> None:
    run = subprocess.run([sys.executable, "-c", WRONG], capture_output=True, text=True, check=True)
    assert run.stdout.split("\n")[0] == "[5] False"
