"""What the project asks for, what is locked, and what public CI runs."""

import os
import re
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

tomllib: Any = pytest.importorskip("tomllib")  # of Python 3.11, as the lock is

REPOSITORY = Path(__file__).resolve().parents[1]
TEXT = (REPOSITORY / "pyproject.toml").read_text()
PROJECT = tomllib.loads(TEXT)["project"]
EXTRAS = PROJECT["optional-dependencies"]
LOCKS = sorted(REPOSITORY.glob("locks/*.txt"))
LOCKED = REPOSITORY / "locks/python{}.{}.txt".format(*sys.version_info)


def pins(lock: Path) -> dict[str, str]:
    """The versions that a lock names, by package."""
    lines = (line.partition("#")[0].strip() for line in lock.read_text().splitlines())
    pairs = (line.split("==") for line in lines if line)
    return {canonicalize_name(name): number for name, number in pairs}


def in_environment() -> list[Requirement]:
    """What `make env` asks for, on the machines that the locks are for: Linux on x86-64."""
    found = re.search(r"^EXTRAS := (.*)$", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    assert found is not None
    lists = [PROJECT["dependencies"], *(EXTRAS[name] for name in found[1].split())]
    return [Requirement(text) for each in lists for text in each]


def problems(locked: dict[str, str], asked: list[Requirement]) -> list[str]:
    """The requirements that a lock does not meet."""
    return [
        f"{each}: {locked.get(canonicalize_name(each.name))}"
        for each in asked
        if not each.specifier.contains(locked.get(canonicalize_name(each.name), "0"))
    ]


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.name)
def test_a_lock_has_all_that_is_asked_for_and_in_its_range(lock: Path) -> None:
    assert problems(pins(lock), in_environment()) == []


def test_what_a_lock_lacks_or_has_outside_its_range_would_be_told() -> None:
    asked = [
        Requirement("numpy>=1.26,<3"),
        Requirement("torch>=2.8,<2.14"),
        Requirement("rich>=13"),
    ]
    told = problems({"numpy": "3.0", "torch": "2.13.0"}, asked)
    assert told == ["numpy<3,>=1.26: 3.0", "rich>=13: None"]


@pytest.mark.parametrize("lock", LOCKS, ids=lambda lock: lock.name)
def test_a_lock_names_packages_and_no_place_build_or_machine(lock: Path) -> None:
    text = lock.read_text()
    assert not re.search(r"://|--|@|\bsha256\b", text)
    for name, number in pins(lock).items():
        assert Version(number).local is None
        assert not name.startswith(("nvidia-", "cuda-"))
    assert "setuptools" in pins(lock)  # torch's part, not only that of installing


def test_the_tests_run_with_what_is_locked() -> None:
    """Elsewhere than in CI they may run with anything in the ranges of pyproject.toml."""
    if not LOCKED.exists():
        pytest.skip(f"there is no {LOCKED.name}")
    differences = [
        f"{name} {found}, not {number}" for name, found, number in differing(pins(LOCKED))
    ]
    if differences and "TAMING_REQUIRE_LOCK" not in os.environ:
        pytest.skip(f"{'; '.join(differences)} (make env)")
    assert differences == []


def differing(locked: dict[str, str]) -> list[tuple[str, str, str]]:
    """What is installed otherwise: name, version here and in the lock."""
    found = [(name, installed(name), number) for name, number in locked.items()]
    return [each for each in found if each[1] != each[2]]


def installed(name: str) -> str:
    try:
        return Version(version(name)).public
    except PackageNotFoundError:
        return "missing"


def test_every_range_has_its_reason_beside_it() -> None:
    """An extra of one line has one for all of it; a build requirement has none."""
    lines = TEXT.partition("[project]")[2].partition("[tool.")[0].splitlines()
    asking = [line for line in lines if re.search(r"""["'][\w-]+ ?[<>=]=""", line)]
    assert len(asking) >= len(PROJECT["dependencies"]) + len(EXTRAS["dev"])
    assert [
        line for line in asking if not re.search(r"  # \S", line) and "python =" not in line
    ] == []


def test_public_ci_runs_what_ci_runs() -> None:
    workflow = yaml.safe_load((REPOSITORY / ".github/workflows/ci.yml").read_text())
    assert {"push", "pull_request"} <= set(workflow[True])  # YAML 1.1 reads `on` as true
    commands = [step.get("run", "") for job in workflow["jobs"].values() for step in job["steps"]]
    assert any(command.split() == [".ci/run"] for command in commands)
    assert os.access(REPOSITORY / ".ci/run", os.X_OK)
