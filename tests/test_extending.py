"""The examples of docs/extending.md are applied to a copy of the package and run.

Each may add one file of code, or one class to the file of its registry; one line to the registry,
with its import; and one YAML file. extending_worker.py runs them, all in one process.
"""

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[1]
PAGE = REPOSITORY / "docs/extending.md"
FENCED = re.compile(r"^```(\w+)\n# (\S+?)(?:, before (\w+))?\n(.*?)^```$", re.DOTALL | re.MULTILINE)
KINDS = {
    "quantizer": "model/quantizer",
    "Networks": "model",
    "loss term": "loss/terms",
    "transformer block": "model/block",
    "condition": "model/condition",
    "order": "model/order",
    "scheme": "model/scheme",
    "data-set layout": None,
}


@dataclass(frozen=True)
class Example:
    """One section of the page: its blocks (language, path, place, text), and its command."""

    kind: str
    blocks: tuple[tuple[str, str, str, str], ...]
    command: str

    def block(self, language: str) -> tuple[str, str, str]:
        (found,) = [rest for found, *rest in self.blocks if found == language]
        path, before, text = found
        return path, before, text


def examples() -> list[Example]:
    found = []
    for section in PAGE.read_text().split("\n## ")[1:]:
        title = section.partition("\n")[0]
        kind = re.sub(r"^An? ", "", title)
        if kind in KINDS:
            (command,) = re.findall(r"^    (python .*)$", section, re.MULTILINE)
            found.append(Example(kind, tuple(FENCED.findall(section)), command))
    return found


EXAMPLES = examples()


def apply(example: Example, copy: Path) -> set[str]:
    """Make the edits of an example; gives the paths of the files that are new or changed."""
    path, before, code = example.block("python")
    registry, _, lines = example.block("diff")
    text = (copy / registry).read_text()
    if before:  # a class among its kind
        assert path == registry
        place = re.search(rf"^(#.*\n)*{before}\b", text, re.MULTILINE)
        assert place is not None
        text = f"{text[: place.start()]}{code}\n\n{text[place.start() :]}"
    else:
        assert not (copy / path).exists()
        (copy / path).write_text(code)
    context = ""
    for line in lines.splitlines():
        if line.startswith("+from ") and line[1:] not in text:
            text = text.replace("\nfrom taming_dist", f"\n{line[1:]}\nfrom taming_dist", 1)
        elif line.startswith("+") and context:
            assert text.count(f"\n{context}\n") == 1
            text = text.replace(f"\n{context}\n", f"\n{context}\n{line[1:]}\n")
        context = line[1:]
    (copy / registry).write_text(text)
    touched = {path, registry}
    if KINDS[example.kind] is not None:
        settings, _, values = example.block("yaml")
        assert not (copy / settings).exists()
        (copy / settings).write_text(values)
        touched.add(settings)
    return touched


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, set[str]]]:
    """A copy of the package with all examples in it, and what each has touched."""
    copy = tmp_path_factory.mktemp("copy")
    for name in ("taming_dist", "conf", "tools"):
        shutil.copytree(
            REPOSITORY / name, copy / name, ignore=shutil.ignore_patterns("__pycache__")
        )
    return copy, {example.kind: apply(example, copy) for example in EXAMPLES}


def test_the_page_has_an_example_of_every_kind() -> None:
    assert [example.kind for example in EXAMPLES] == list(KINDS)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.kind)
def test_an_example_is_one_file_one_registry_line_and_one_yaml(
    copied: tuple[Path, dict[str, set[str]]], example: Example
) -> None:
    added = [line for line in example.block("diff")[2].splitlines() if line.startswith("+")]
    imports = [line for line in added if line.startswith("+from taming_dist.")]
    assert len(added) - len(imports) == 1
    assert len(imports) <= 1
    settings = {path for path in copied[1][example.kind] if path.startswith("conf/")}
    group = KINDS[example.kind]
    assert {str(Path(path).parent) for path in settings} == ({f"conf/{group}"} if group else set())
    known = {path for path in copied[1][example.kind] if (REPOSITORY / path).exists()}
    assert known == {example.block("diff")[0]}
    assert len(copied[1][example.kind] - known - settings) == (
        0 if example.block("python")[1] else 1
    )


def test_every_example_runs(copied: tuple[Path, dict[str, set[str]]], tmp_path: Path) -> None:
    paths = os.pathsep.join(map(str, (copied[0], copied[0] / "tools", REPOSITORY)))
    ended = subprocess.run(
        [sys.executable, REPOSITORY / "tests/extending_worker.py"],
        input="\n".join(example.command for example in EXAMPLES),
        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr
    done = [line for line in ended.stdout.splitlines() if line.startswith("done: ")]
    assert done == [f"done: {example.command}" for example in EXAMPLES]
