"""The commands from images to samples scale by scale, as children of one process, which imports
everything once.

    python tests/scale_runs.py FOLDER      # which has image shards of classes in FOLDER/images
"""

import os
import runpy
import sys
from pathlib import Path

import torch

from taming_dist.engine.start import load_deepspeed

ROOT = Path(__file__).resolve().parents[1]
SHORT = [
    "+scale=laptop",
    "train.steps=6",
    "train.log_every=1",
    "train.checkpoint_every=6",
    "train.validate_every=6",
    "train.preview_every=6",
    "train.preview_images=2",
    "data.global_batch=4",
    "data.micro_batch=2",
    "data.lanes=2",
    "data.block=2",
    "log.wandb=disabled",
]
TOKENIZER = [
    "+experiment=var_tiny",
    "data.train=images",
    "data.val=images",
    "data.size=16",
    "model.resolution=16",
    "model.multipliers=[1,1]",
    "model.quantizer.scales=[1,2,4,8]",
    "model.quantizer.codes=32",
    "loss.terms.perceptual.weight=0",
]
PRIOR = [
    "+experiment=var_tiny_transformer",
    "data.train=codes",
    "data.val=codes",
    "data.vqgan=outputs/tokenizer/export",
    "model.scheme.scales=[1,2,4,8]",
    "model.condition.classes=3",
    "model.width=32",
    "model.layers=2",
]
MODELS = ["transformer=outputs/prior/export", "vqgan=outputs/tokenizer/export", "n=4"]


def command(name: str, *words: str) -> None:
    """Run `python -m taming_dist.NAME`, or tools/NAME.py, in a child; it has to end well."""
    child = os.fork()
    if child == 0:
        sys.argv = [name, *words]
        path = ROOT / "tools" / f"{name}.py"
        if path.exists():
            runpy.run_path(str(path), run_name="__main__")
        else:
            runpy.run_module(f"taming_dist.{name}", run_name="__main__")
        sys.stdout.flush()
        os._exit(0)
    ending = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert ending == 0, f"{words}: {ending}"


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.chdir(sys.argv[1])
    load_deepspeed()
    command("train", *TOKENIZER, *SHORT, "run.name=tokenizer")
    codes = ["--shards", "images", "--out", "codes", "--batch", "4"]
    command("tokenize_dataset", "--model", "outputs/tokenizer/export", *codes)
    command("train", *PRIOR, *SHORT, "run.name=prior")
    for out, *more in (["samples"], ["alone", "batch=1"], ["guided", "guidance=3"]):
        command("sample", *MODELS, f"out={out}", "seed=5", "acceptance=0.5", *more)
    command("evaluate", "model=outputs/prior/export", "data=codes", "out=evaluated")
