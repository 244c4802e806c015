"""Runs of stage 2 as children of one process, which has imported everything once: one goes through,
one is killed right after it has kept a best model, and is started again.

    python tests/prior_runs.py FOLDER      # which has code shards in FOLDER/codes
"""

import os
import signal
import sys
from pathlib import Path

import torch

from taming_dist import train
from taming_dist.engine.start import load_deepspeed
from taming_dist.training.export import Export

SETTINGS = [
    "+experiment=flickr_transformer",
    "+scale=laptop",
    "data.train=codes",
    "data.val=codes",
    "data.vqgan=",
    "data.global_batch=4",
    "data.micro_batch=2",
    "data.lanes=2",
    "data.block=2",
    "model.layers=1",
    "model.heads=2",
    "model.width=16",
    "model/condition=class",
    "model/order=rar",
    "model.scheme.pkeep=0.8",
    "model.dropout_embedding=0.1",
    "model.dropout_residual=0.1",
    "model.dropout_attention=0.1",
    "loss.condition_dropout=0.3",
    "optim.lr=1e-2",
    "train.steps=8",
    "train.log_every=1",
    "train.checkpoint_every=3",
    "train.validate_every=2",
    "log.wandb=disabled",
]
BEST_THAT_KILLS = 2  # the one of step 4; the newest checkpoint is that of step 3


def kill_after_the_best() -> None:
    """Have this process killed once it has exported its so-manieth best model."""
    write, seen = Export.write, []

    def killed(self: Export, folder: Path) -> None:
        write(self, folder)
        seen.extend(["best"] if folder.name == "export-best" else [])
        if len(seen) == BEST_THAT_KILLS:
            os.kill(os.getpid(), signal.SIGKILL)

    Export.write = killed  # type: ignore[method-assign]


def run(name: str, *more: str, killed: bool = False) -> int:
    """Train in a child; gives how it ended."""
    child = os.fork()
    if child == 0:
        if killed:
            kill_after_the_best()
        sys.argv = ["train.py", *SETTINGS, f"run.name={name}", *more]
        train.main()
        sys.stdout.flush()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.chdir(sys.argv[1])
    load_deepspeed()
    assert run("whole", "+debug=profile", "debug.every_rank=true") == 0
    assert run("parts", killed=True) == -signal.SIGKILL
    assert run("parts") == 0
