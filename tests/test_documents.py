"""Every command that the documents tell starts: read from README, docs/, conf/, slurm/ and what the
tools say of themselves, and run.

Training, sampling and evaluation are composed and checked for the ranks that the command names; the
tools parse their arguments; job scripts run under a stand-in for Slurm, which tells the ranks and
the command that they would start.
"""

import argparse
import ast
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import metadata
from pathlib import Path
from typing import Any

import pytest
from hydra.core.config_store import ConfigStore
from packaging.requirements import Requirement

import taming_dist.config
from taming_dist.config import check

REPOSITORY = Path(__file__).resolve().parents[1]
DOCUMENTS = [
    *(REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md")),
    # the commands of extending.md need its examples: tests/test_extending.py
    *sorted(path for path in REPOSITORY.glob("docs/*.md") if path.name != "extending.md"),
    *sorted((REPOSITORY / "conf").rglob("*.yaml")),
    *sorted((REPOSITORY / "slurm").glob("*.sh")),
    *sorted((REPOSITORY / "tools").glob("*.py")),
    *sorted((REPOSITORY / ".github/ISSUE_TEMPLATE").glob("*.md")),
]
PROGRAMS = (
    r"python (-m (taming_dist|pytest)|tools/)|torchrun |sbatch .*\.sh|slurm/\w+\.sh \S|"
    r"make [a-z]|pytest |pip install |\.ci/run"
)
OURS = r"\bpython3? .*(-m taming_dist|\btools/)|\b(bash|sbatch|srun) .*\bslurm/\w+\.sh"
PLACEHOLDERS = {
    "+experiment=NAME": "+experiment=custom",
    "key=value": None,
    "option": None,
    "...": None,
}


HYDRAS_OWN = ("hydra", "_dummy_empty_config_.yaml")


@dataclass(frozen=True)
class Command:
    """A command as a document has it, and how it is typed: without what stands for more."""

    place: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.place}: {' '.join(self.words)}"


def lines_of(path: Path) -> Iterator[tuple[int, str]]:
    """What may be a command: lines of code and `spans` of it; of other files, their comments."""
    text = re.sub(r"\\\n[# ]*", lambda found: " " * 1, path.read_text())
    fenced = False
    if path.suffix == ".py":
        text = ast.get_docstring(ast.parse(path.read_text())) or ""
        text = re.sub(r" \\?\n {5,}", " ", text)
    for number, line in enumerate(text.splitlines(), 1):
        if path.suffix not in (".md", ".py"):
            if line.startswith("#"):
                yield number, re.sub(r"^#+ *(Command: )?", "", line)
            continue
        if line.startswith("```"):
            fenced = not fenced
        elif fenced or line.startswith("    "):
            yield number, line.strip()
        else:
            yield from ((number, span) for span in re.findall(r"`([^`]+)`", line))


def typed(text: str) -> list[str]:
    """The words of a command: [what may be left out] is given, of this|that the first is taken."""
    words = shlex.split(re.sub(r"(^| )\[([^]]*)\](?=$| )", r"\1\2", text), comments=True)
    words = [re.sub(r"^([\w.]+)\|[\w.|]+$", r"\1", word) for word in words]
    return [word for word in (PLACEHOLDERS.get(word, word) for word in words) if word]


def commands_of(path: Path) -> Iterator[Command]:
    """The commands of a document."""
    for number, line in lines_of(path):
        line = re.sub(r"^\w+=\$\((.*)\)$", r"\1", line)  # its output is kept in a variable
        if re.match(PROGRAMS, line):
            yield Command(f"{path.relative_to(REPOSITORY)}:{number}", tuple(typed(line)))


COMMANDS = [command for path in DOCUMENTS for command in commands_of(path)]
DIFFERENT = list({command.words: command for command in COMMANDS}.values())


class Started(BaseException):
    """Raised where a command has come as far as it is run here."""


def ranks_of_torchrun(words: list[str]) -> tuple[int, list[str]]:
    options = [word for word in words if word.startswith("--n")]
    (ranks,) = (int(word.split("=")[1]) for word in options)
    return ranks, [word for word in words if word not in options]


@pytest.fixture
def start(elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run the words of a command on so many ranks."""

    def call(words: list[str], ranks: int = 1) -> None:
        if words[0] == "torchrun":
            ranks, words = ranks_of_torchrun(words[1:])
            words = ["python", *words]
        if words[0] == "sbatch":
            ranks, words = started_by_slurm(words[1:], elsewhere)
        kind = words[0]
        if kind == "make":
            subprocess.run(["make", "-n", *words[1:]], cwd=REPOSITORY, check=True)
        elif kind in ("pytest", ".ci/run") or words[:3] == ["python", "-m", "pytest"]:
            assert (REPOSITORY / words[-1]).exists()
        elif kind.startswith("slurm/"):  # tests/slurm runs it
            scripts = [REPOSITORY / word for word in words if word.endswith(".sh")]
            subprocess.run(["bash", "-n", *scripts], check=True)
        elif kind == "pip":
            assert all(can_be_installed(word) for word in words[2:])
        else:
            assert kind == "python"
            with monkeypatch.context() as patched, pytest.raises(Started):
                run_python(words[1:], ranks, patched)

    return call


def can_be_installed(word: str) -> bool:
    """Whether it is this repository, one of our extras or a package that we know."""
    if word == ".":
        return True
    asked, ours = Requirement(word), metadata("taming_dist")
    if asked.name == "taming-dist":
        return asked.extras <= set(ours.get_all("Provides-Extra") or ())
    return asked.name in {Requirement(text).name for text in ours.get_all("Requires-Dist") or ()}


def run_python(words: list[str], ranks: int, patched: pytest.MonkeyPatch) -> None:
    """A module of the package or a tool, in this process, until it knows what to do."""
    hydra_entry, parse_args = taming_dist.config.hydra_entry, argparse.ArgumentParser.parse_args

    def composed(name: str, schema: type, main: Any, *others: Any, **settings: Any) -> None:
        def started(config: Any) -> None:
            if name == "train":
                check(config, ranks)
            raise Started

        hydra_entry(name, schema, started, *others, **settings)

    def parsed(parser: argparse.ArgumentParser, *arguments: Any) -> None:
        parse_args(parser, *arguments)
        raise Started

    patched.setattr(taming_dist.config, "hydra_entry", composed)
    store = ConfigStore.instance()  # as in a process of its own
    patched.setattr(store, "repo", {name: store.repo[name] for name in HYDRAS_OWN})
    if words[:2] == ["-m", "taming_dist"] or words[0] != "-m":  # else Hydra parses
        patched.setattr(argparse.ArgumentParser, "parse_args", parsed)
    if words[0] == "-m":
        patched.setattr(sys, "argv", words[1:])
        module = "taming_dist.__main__" if words[1] == "taming_dist" else words[1]
        patched.delitem(sys.modules, module, raising=False)
        runpy.run_module(words[1], run_name="__main__")
    else:
        patched.syspath_prepend(REPOSITORY / "tools")
        patched.setattr(sys, "argv", words)
        runpy.run_path(str(REPOSITORY / words[0]), run_name="__main__")


STAND_IN = {
    "scontrol": "echo node1",
    "srun": 'printf "%s\\n" "$@"',
    "python": "exit 0",  # the scripts ask it whether there is a taming_dist
}


def started_by_slurm(words: list[str], folder: Path) -> tuple[int, list[str]]:
    """The ranks that a job has, and the command of each: the script is run, with a srun that says
    what it was told."""
    place = next(index for index, word in enumerate(words) if word.endswith(".sh"))
    script = REPOSITORY / words[place]
    directives = re.findall(r"^#SBATCH (--\S+)", script.read_text(), re.MULTILINE)
    options = dict(
        re.findall(r"^--([a-z-]+)=(\d+)", "\n".join([*directives, *words[:place]]), re.M)
    )
    gpus, nodes = int(options["gpus-per-node"]), int(options["nodes"])
    tasks, cpus = int(options["ntasks-per-node"]), int(options["cpus-per-task"])
    (folder / ".venv/bin").mkdir(parents=True)
    (folder / "slurm").symlink_to(REPOSITORY / "slurm")
    (folder / "tools").symlink_to(REPOSITORY / "tools")
    (folder / ".venv/bin/activate").write_text(f'PATH="{folder}/.venv/bin:$PATH"\n')
    for name, body in STAND_IN.items():
        (folder / ".venv/bin" / name).write_text(f"#!/bin/sh\n{body}\n")
        (folder / ".venv/bin" / name).chmod(0o755)
    environment = {
        "TAMING_DIST": str(folder),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "node1",
        "SLURM_JOB_NUM_NODES": str(nodes),
        "SLURM_GPUS_ON_NODE": str(gpus),
        "SLURM_NTASKS": str(nodes * tasks),
        "SLURM_CPUS_PER_TASK": str(cpus),
        "SLURM_CPUS_ON_NODE": str(tasks * cpus),
    }
    said = subprocess.run(
        ["bash", script, *words[place + 1 :]],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    ranks = next(int(word.split("=")[1]) for word in said if word.startswith("--ntasks="))
    return ranks, [word.removeprefix(f"{folder}/") for word in said[said.index("python") :]]


@pytest.mark.parametrize("command", DIFFERENT, ids=str)
def test_every_documented_command_starts(start: Any, command: Command) -> None:
    start(list(command.words))


def test_commands_are_found_in_all_kinds_of_documents() -> None:
    found = {str(command).split(":")[0] for command in COMMANDS}
    experiments = {f"conf/experiment/{path.name}" for path in REPOSITORY.glob("conf/experiment/*")}
    demo = {f"conf/experiment/{path.name}" for path in REPOSITORY.glob("conf/experiment/demo*")}
    assert experiments - demo <= found
    assert {"README.md", "docs/operations.md", "slurm/train_vqgan.sh", "conf/sample.yaml"} <= found
    assert any("--nodes=4" in command.words for command in COMMANDS)


def test_no_command_hides_behind_other_words() -> None:
    lines = [
        f"{path.relative_to(REPOSITORY)}:{number} {line}"
        for path in DOCUMENTS
        for number, line in lines_of(path)
        if re.search(OURS, line) and not re.match(rf"(\w+=\$\()?({PROGRAMS})", line)
    ]
    assert lines == []


@pytest.mark.parametrize("script", ["train_vqgan.sh", "train_transformer.sh"])
def test_a_training_job_starts_by_its_defaults(start: Any, script: str) -> None:
    start(["sbatch", f"slurm/{script}"])


@pytest.mark.parametrize(
    "words",
    [
        "torchrun --nproc_per_node=8 -m taming_dist.train +experiment=flickr data.global_batch=12",
        "python tools/make_shards.py --images DIR --oout DIR",
        "python -m taming_dist.sample transformer=A vqgan=B out=C m=3",
        "python -m taming_dist --versions-of-all",
        "pip install taming-dist[texts]",
    ],
)
def test_a_command_that_would_not_start_is_noticed(start: Any, words: str) -> None:
    with pytest.raises((SystemExit, AssertionError, taming_dist.config.UserError)):
        start(words.split())
