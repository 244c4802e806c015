import runpy
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from taming_dist.errors import UserError
from taming_dist.stages.interface import Config

REPOSITORY = Path(__file__).parents[2]
sys.path.insert(0, str(REPOSITORY / "tools"))
tool = runpy.run_path(str(REPOSITORY / "tools" / "demo.py"))
ON_CPU, ON_GPU = tool["ON_CPU"], tool["ON_GPU"]
Compose = Callable[..., Config]


def folder_of_photographs(folder: Path, *classes: str) -> Path:
    for name in (".hidden", *classes):
        (folder / name).mkdir(parents=True)
    return folder


def trainings(compose: Compose, demo: Any, images: Path | None = None) -> list[Config]:
    """Both configurations, as their commands have them."""
    commands = [phase.command for phase in tool["phases"](demo, Path("out"), images)]
    return [compose(*words[2:]) for words in commands if "taming_dist.train" in words]


@pytest.mark.parametrize("demo", [ON_CPU, ON_GPU], ids=["demo", "demo-gpu"])
def test_both_stages_of_a_demo_fit_each_other(compose: Compose, demo: Any) -> None:
    first, second = trainings(compose, demo)
    model, prior = first.model, second.model
    assert first.data.size == model.resolution == demo.size
    assert prior.grid == [demo.size // model.factor] * 2
    assert prior.vocabulary == model.vocabulary
    assert second.data.vqgan == str(Path(first.run.dir) / "export")
    assert first.data.flip == (demo.views == "flip")
    assert second.loss.condition_dropout > 0  # sampling is guided
    assert 0 < first.loss.disc_start < first.train.steps
    assert first.engine.precision == second.engine.precision
    assert (first.engine.precision == "bf16") == (demo is ON_GPU)


def test_folders_of_photographs_are_classes_and_others_have_none(
    compose: Compose, tmp_path: Path
) -> None:
    with_two = folder_of_photographs(tmp_path / "two", "cats", "dogs")
    with_one = folder_of_photographs(tmp_path / "one", "all of them")
    for images, condition in ((with_two, "class"), (with_one, "none")):
        _, prior = trainings(compose, ON_GPU, images)
        assert prior.model.condition.name == condition
        chain = [shlex.join(each.command) for each in tool["phases"](ON_GPU, Path("out"), images)]
        assert sum(" --labels folders" in command for command in chain) == (condition == "class")
        assert sum(" guidance=" in command for command in chain) == (condition == "class")
    with pytest.raises(UserError, match="no such folder"):
        tool["phases"](ON_GPU, Path("out"), tmp_path / "three")


def test_the_list_has_every_command_and_runs_none(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(REPOSITORY)
    tool["main"](["--gpu", "--out", str(tmp_path / "out"), "--list"])
    said = capsys.readouterr().out.splitlines()
    assert [line.removeprefix("python ").removeprefix("-m ").split()[0] for line in said] == [
        "tools/fetch_lpips.py",
        "tools/demo_photographs.py",
        "tools/make_shards.py",
        "tools/make_shards.py",
        "taming_dist.train",
        "tools/tokenize_dataset.py",
        "tools/tokenize_dataset.py",
        "taming_dist.train",
        "taming_dist.sample",
        "taming_dist.evaluate",
        "taming_dist.evaluate",
    ]
    assert not (tmp_path / "out").exists()


def test_other_photographs_are_for_the_larger_demo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPOSITORY)
    with pytest.raises(UserError, match="--images is for --gpu"):
        tool["main"](["--images", "photographs", "--list"])


def test_without_a_gpu_the_larger_demo_is_refused_before_anything_is_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(REPOSITORY)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"no GPU here; make demo runs on the CPU"):
        tool["main"](["--gpu", "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
