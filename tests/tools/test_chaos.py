"""`tools/chaos.py`: real training that is killed ends as if nobody had disturbed it; and it would
be noticed if it did not."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture
def differing_bits(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(TOOLS))
    from trials.comparing import differing_bits

    return differing_bits


def make_run(run_dir: Path) -> Path:
    """What a run of one step on two ranks leaves."""
    files = {
        "metrics.jsonl": '{"step": 1, "samples": 4, "time": 1.5, "train/loss": 0.25}\n',
        "export/model.safetensors": "weights",
        "checkpoints/images-000000000004/meta.json": "{}",
        f"../{run_dir.name}-starts/0000-0.samples": "4 a c\n",
        f"../{run_dir.name}-starts/0000-1.samples": "4 b d\n",
    }
    for name, text in files.items():
        (run_dir / name).parent.mkdir(parents=True, exist_ok=True)
        (run_dir / name).write_text(text)
    return run_dir


def test_equal_runs_differ_in_nothing_but_the_time(tmp_path: Path, differing_bits: Any) -> None:
    one, other = make_run(tmp_path / "one"), make_run(tmp_path / "other")
    metrics = one / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace("1.5", "2.5"))
    assert differing_bits(one, other) == []


@pytest.mark.parametrize(
    ("name", "text", "what"),
    [
        (
            "metrics.jsonl",
            '{"step": 1, "samples": 4, "train/loss": 0.5}\n',
            "metrics.jsonl, step 1: train/loss",
        ),
        ("export/model.safetensors", "Weights", "export/model.safetensors"),
        (
            "checkpoints/images-000000000004/meta.json",
            "[]",
            "checkpoints/images-000000000004/meta.json",
        ),
        ("export/another", "", "export/another"),
        ("../one-starts/0000-1.samples", "4 b c\n", "samples of the batch that ends at image 4"),
        # a start that was killed had other samples in the same batch
        ("../one-starts/0001-0.samples", "4 a b\n", "samples of the batch that ends at image 4"),
    ],
)
def test_whatever_differs_is_named(
    tmp_path: Path, differing_bits: Any, name: str, text: str, what: str
) -> None:
    one, other = make_run(tmp_path / "one"), make_run(tmp_path / "other")
    (one / name).write_text(text)
    assert differing_bits(one, other) == [what]


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        ["--kills", "6", "--zero", "1", "--ranks", "2"],
        ["--kills", "4", "--zero", "0", "3", "--ranks", "1", "2", "--change"],
    ],
    ids=["the same ranks", "other ranks and stages"],
)
def test_killed_training_ends_as_an_undisturbed_run(tmp_path: Path, options: list[str]) -> None:
    command = [sys.executable, str(TOOLS / "chaos.py"), *options]
    command += ["--steps", "18", "--out", str(tmp_path / "chaos")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (found,) = json.loads((tmp_path / "chaos" / "figures.json").read_text()).values()
    assert found["wrong"] == []
    assert sum(run["kills"] for run in found["runs"]) == int(options[1])
    assert all(lost <= 5 for run in found["runs"] for lost in run["lost"])


@pytest.mark.slow
def test_a_folder_that_is_in_use_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine").touch()
    command = [sys.executable, str(TOOLS / "chaos.py"), "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == (
        f"error: --out={tmp_path} is not empty: remove it, or name another folder\n"
    )
