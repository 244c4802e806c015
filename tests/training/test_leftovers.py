"""What a run that was killed while writing has left is removed at the next start, and only that."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import torch

from taming_dist.atomic import write_bytes
from taming_dist.engine.checkpoint import Checkpoints
from taming_dist.engine.draft import GivenUp
from taming_dist.engine.world import World
from taming_dist.models.vqgan import VQGAN
from taming_dist.training.clock import Clock
from taming_dist.training.export import write_export
from taming_dist.training.leftovers import remove_leftovers
from taming_dist.training.recipe import Preview
from taming_dist.training.sinks import MetricsFile, Sinks
from tests.training.test_export import CONFIG

BLACK = Preview(torch.zeros(3, 2, 2, dtype=torch.uint8), ())
ALONE = World(0, 1, 0, torch.device("cpu"))
CLOCK = Clock(global_batch=4, total_steps=10, images=12)


def killed_while_renaming(write: Callable[[], object]) -> None:
    """Run `write` in a process that is killed when what it wrote is to appear."""
    child = os.fork()
    if child == 0:
        os.replace = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
        write()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL


def everything(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_what_a_killed_run_was_writing_is_removed_and_nothing_else(tmp_path: Path) -> None:
    metrics, model = MetricsFile(tmp_path), VQGAN(CONFIG)
    metrics.log(CLOCK, {"a": 1.0})
    for name in ("notes.tmp", "images/mine.tmp", "checkpoints/mine.tmp", ".export"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("not the run's")
    before = everything(tmp_path)
    checkpoints = Checkpoints(tmp_path / "checkpoints", ALONE)
    writers: list[Callable[[], object]] = [
        lambda: metrics.rewind(CLOCK),
        lambda: Sinks(tmp_path, []).image(CLOCK, BLACK),
        lambda: checkpoints.write(checkpoints.begin(3, {}, {"images": 12}), GivenUp()),
        lambda: write_export(VQGAN, CONFIG, model.state_dict(), tmp_path / "export"),
        lambda: write_bytes(tmp_path / "config.yaml", b"run: {}\n"),
        lambda: write_bytes(tmp_path / "wandb-id", b"0123abcd"),
    ]
    (tmp_path / "export").mkdir()
    for number, write in enumerate(writers, start=1):
        killed_while_renaming(write)
        assert len(leftovers(tmp_path, before)) == number
    remove_leftovers(tmp_path)
    assert everything(tmp_path) == sorted([*before, "export"])


def leftovers(folder: Path, before: list[str]) -> list[str]:
    """The topmost files and folders that were not there before."""
    new = set(everything(folder)) - set(before) - {"export"}
    return [name for name in new if str(Path(name).parent) not in new]
