"""What `python -m taming_dist` says, and what it says it of."""

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import taming_dist
from taming_dist import __main__ as entry

REPOSITORY = Path(__file__).resolve().parents[1]
VERSION = "--version"
# Runs it, and then tells on stderr which of the slow libraries have been imported.
TRACED = """
import runpy, sys
sys.argv = ["taming_dist", *sys.argv[1:]]
runpy.run_module("taming_dist", run_name="__main__", alter_sys=True)
print(*sorted({"torch", "deepspeed", "wandb", "hydra"} & set(sys.modules)), file=sys.stderr)
"""


def said(*words: str, path: Path | None = None, status: int = 0) -> tuple[str, str]:
    """What it prints and what it writes to stderr; packages in `path` hide those installed."""
    search = [str(path)] if path else []
    done = subprocess.run(
        [sys.executable, "-c", TRACED, *words],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([*search, str(REPOSITORY)])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == status, done.stderr
    return done.stdout, done.stderr.strip()


def lines(text: str) -> dict[str, str]:
    return dict(line.split(maxsplit=1) for line in text.splitlines())


def stand_in(folder: Path, code: str) -> Path:
    """A torch built for CUDA, as far as this looks at it."""
    (folder / "torch").mkdir()
    (folder / "torch/version.py").write_text("cuda = '13.0'\nhip = None\n")
    (folder / "torch/__init__.py").write_text(code)
    return folder


def test_versions_of_everything_are_told_without_importing_it() -> None:
    text, imported = said(VERSION)
    told = lines(text)
    assert told["taming_dist"].startswith(f"{taming_dist.__version__} in {REPOSITORY}/taming_dist")
    for name in ("torch", "deepspeed", "triton", "webdataset", "wandb", "hydra-core", "numpy"):
        assert told[name] == importlib.metadata.version(name)
    assert {"[demo]", "[dev]", "[parquet]", "[text]"} <= set(told)
    assert re.search(r"^\d+ CPU cores; ", told["devices"])
    from torch import version

    if version.cuda is None and version.hip is None:
        assert told["devices"].endswith("; GPUs unknown to this build of torch")
        assert imported == ""


def test_a_checkout_tells_its_commit() -> None:
    head = subprocess.run(
        ["git", "-C", REPOSITORY, "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    if head.returncode:
        pytest.skip("this is no git repository")
    assert f", commit {head.stdout[:10]}" in entry.commit(REPOSITORY)


def test_a_folder_that_is_no_repository_has_no_commit(tmp_path: Path) -> None:
    assert entry.commit(tmp_path) == ""
    (tmp_path / ".git").mkdir()
    assert entry.commit(tmp_path) == ""


def test_gpus_are_those_that_torch_names(tmp_path: Path) -> None:
    code = (
        "class cuda:\n"
        "    device_count = staticmethod(lambda: 2)\n"
        "    get_device_name = staticmethod(lambda index: f'Card {index}')\n"
    )
    text, _ = said(VERSION, path=stand_in(tmp_path, code))
    assert lines(text)["devices"].endswith("; Card 0, Card 1 (torch for CUDA 13.0)")


def test_a_torch_that_cannot_be_imported_does_not_stop_the_report(tmp_path: Path) -> None:
    code = "raise ImportError('libcudart.so.13: cannot open shared object file\\nmore')"
    told = lines(said(VERSION, path=stand_in(tmp_path, code))[0])
    assert told["devices"].endswith(
        "; GPUs unknown, torch fails: libcudart.so.13: cannot open shared object file"
    )
    assert "numpy" in told


def packaged(folder: Path, *asked: str) -> Path:
    """What pip would know of us, had pyproject.toml asked for this."""
    information = folder / "taming_dist-0.1.0.dist-info"
    information.mkdir()
    required = "".join(f"Requires-Dist: {each}\n" for each in asked)
    head = "Metadata-Version: 2.1\nName: taming_dist\nVersion: 0.1.0\n"
    (information / "METADATA").write_text(head + required)
    return folder


def test_what_is_missing_or_out_of_its_range_is_told(tmp_path: Path) -> None:
    known = packaged(
        tmp_path,
        "numpy>=1000",
        "rich>=13",
        "no-such-package",
        "for-others; sys_platform == 'none'",
        "rich; extra == 'seen'",
        "rich>=13; extra == 'unseen'",
        "no-such-package; extra == 'unseen'",
        "another; extra == 'unseen' and sys_platform == 'none'",
    )
    told = lines(said(VERSION, path=known)[0])
    assert told["numpy"] == f"{importlib.metadata.version('numpy')} (not >=1000)"
    assert told["rich"] == importlib.metadata.version("rich")
    assert told["no-such-package"] == "missing"
    assert "for-others" not in told
    assert told["[seen]"] == "there"
    assert told["[unseen]"] == "missing no-such-package"


def test_without_words_it_names_the_commands_there_are() -> None:
    text, _ = said()
    modules = set(re.findall(r"python -m (taming_dist\.\w+)", text))
    found = {
        path for path in REPOSITORY.glob("taming_dist/*.py") if "hydra_entry(" in path.read_text()
    }
    assert modules == {
        f"taming_dist.{path.stem}" for path in found - {REPOSITORY / "taming_dist/config.py"}
    }


def test_a_mistyped_option_is_one_line() -> None:
    assert said("--versoin", status=2) == (
        "",
        "error: unrecognized arguments: --versoin; see --help for all arguments",
    )


@pytest.mark.gpu
def test_the_gpu_of_this_machine_is_named() -> None:
    import torch

    assert torch.cuda.get_device_name(0) in entry.gpus()
