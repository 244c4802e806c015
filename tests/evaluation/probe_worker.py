"""A rank of a probe with a tiny recipe: `python probe_worker.py FOLDER/NAME`.

FOLDER/NAME.json has the settings of the command, and `stop` for a signal after some steps.
How it has ended is told to FOLDER/NAME.end.
"""

import json
import os
import signal
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from taming_dist import evaluate, probe
from taming_dist.evaluation.config import EvaluateConfig
from taming_dist.evaluation.probe_recipe import ProbeRecipe

TINY = ProbeRecipe(
    layers=1,
    width=16,
    heads=2,
    images=160,
    warmup_images=16,
    lr=2e-2,
    seed=23,
    batch=8,
    reading_block=4,
)


def interrupted(steps: Iterator[Any], *_: Any) -> Iterator[Any]:
    """The steps, and a signal within the third."""
    for number, step in enumerate(steps):
        if number == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        yield step


if __name__ == "__main__":
    torch.set_num_threads(1)
    out = Path(sys.argv[1])
    os.environ["TAMING_DIST_END"] = f"{out}.end"
    settings = json.loads(out.with_name(f"{out.name}.json").read_text())
    if settings.pop("stop"):
        probe.with_progress = interrupted  # type: ignore[assignment]
    evaluate.run_probe = partial(probe.run_probe, recipe=TINY)  # type: ignore[assignment]
    evaluate.main(EvaluateConfig(probe=True, out=str(out), batch=4, **settings))
