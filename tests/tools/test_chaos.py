"""`tools/chaos.py` and `tools/chaos_calls.py`: real training that is killed ends as if nobody had
disturbed it; and it would be noticed if it did not."""

import json
import os
import shutil
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


@pytest.mark.slow
@pytest.mark.parametrize("options", [["--zero", "1"], ["--stage", "vqgan", "--zero", "3"]])
def test_training_killed_in_a_call_of_the_file_system_ends_as_an_undisturbed_run(
    tmp_path: Path, options: list[str]
) -> None:
    command = [sys.executable, str(TOOLS / "chaos_calls.py"), *options]
    command += ["--most", "6", "--out", str(tmp_path / "chaos")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads((tmp_path / "chaos" / "figures.json").read_text())
    assert found["wrong"] == []
    assert found["calls"] > 100
    assert found["tried"] - len(found["missed"]) >= 4


def test_each_call_that_concerns_a_folder_is_told_from_all_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(TOOLS))
    from trials.cutting import Cut

    mine = tmp_path / "mine"
    with monkeypatch.context() as patched:
        cut = Cut(mine, lambda _: False, patched.setattr, pytest.fail)
        (tmp_path / "other").mkdir()
        mine.mkdir()
        for _ in range(2):
            with open(mine / "file.tmp", "wb") as file:
                file.write(b"one")
                file.write(b"two")
                file.flush()
                os.fsync(file.fileno())
            os.replace(mine / "file.tmp", mine / "file")
        shutil.rmtree(mine)
    once = ["open file.tmp", "write file.tmp", "fsync file.tmp", "replace file.tmp"]
    twice = [f"{name} (2)" for name in once]
    assert list(map(str, cut.calls)) == ["mkdir mine", *once, *twice, "unlink file", "rmdir mine"]


def test_a_write_is_cut_in_its_middle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(TOOLS))
    from trials.cutting import Call, Cut

    def end() -> None:
        raise KeyboardInterrupt

    last = Call("write", "file", 2)
    with monkeypatch.context() as patched:
        Cut(tmp_path, lambda call: call == last, patched.setattr, end)
        (tmp_path / "file").write_text("whole")
        with pytest.raises(KeyboardInterrupt):
            (tmp_path / "file").write_text("12345678")
    assert (tmp_path / "file").read_text() == "1234"
