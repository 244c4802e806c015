"""The whole chain on photographs that come with Python packages: `make demo`, `make demo-gpu`.

    python tools/demo.py [--out outputs/demo] [--list]
    python tools/demo.py --gpu [--images DIR] [--out outputs/demo-gpu] [--list]

Runs the project's own commands one after the other, each as a user would type it, and ends with a
report. Finished phases are not repeated; an interrupted one resumes. `--list` prints the commands.
With `--images` the photographs are those of a folder, whose folders, if it has two or more, are
classes.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from reports.page import write_page

from taming_dist import cli
from taming_dist.errors import UserError
from taming_dist.formats.manifest import MANIFEST, Manifest
from taming_dist.formats.strict_json import write_json
from taming_dist.pretrained import BACKBONES

SAMPLES_PER_CLASS = 8
MOST_SAMPLES = 96
GIB = 2**30


@dataclass(frozen=True)
class Demo:
    """What the demos differ in: their experiments, `of_classes` (overrides of the second that make
    it class-conditional, unless it is), pixels of an image's side, `views` of an image that become
    codes (see tokenize_dataset.py), and how samples of classes are guided."""

    out: Path
    vqgan: str
    transformer: str
    of_classes: tuple[str, ...]
    size: int
    views: str
    guidance: float


ON_CPU = Demo(Path("outputs/demo"), "demo", "demo_transformer", (), 48, "center", 1.5)
ON_GPU = Demo(
    Path("outputs/demo-gpu"), "demo_gpu", "demo_gpu_transformer",
    ("model/condition=class", "loss.condition_dropout=0.1"), 128, "flip", 1.5,
)  # fmt: skip


@dataclass(frozen=True)
class Phase:
    """One command of the chain, as the arguments of python; `made` exists when it is done.

    For training it is events.jsonl, which must also say that the run finished: an interrupted run
    leaves an export as well.
    """

    name: str
    command: tuple[str, ...]
    made: Path

    @property
    def is_complete(self) -> bool:
        if not self.made.exists():
            return False
        if self.made.name != "events.jsonl":
            return True
        events = [json.loads(line) for line in self.made.read_text().splitlines()]
        return any(event["event"] == "exit" and event["finished"] for event in events)


def phases(demo: Demo, out: Path, images: Path | None = None) -> list[Phase]:
    """The commands of the chain, in order. How many samples there are is known once shards are."""
    shards, codes = out / "shards", out / "codes"
    vqgan, transformer, figures = out / "vqgan", out / "transformer", out / "evaluation"
    of_classes = images is None or has_classes(images)
    conditional = demo.of_classes if of_classes else ()
    guided = (f"guidance={demo.guidance}",) if of_classes else ()
    count = number_of_samples(shards / "train")
    return [
        Phase("LPIPS weights", ("tools/fetch_lpips.py",), BACKBONES["vgg"].cache_file),
        *(built_in(demo, out) if images is None else [given(demo, out, images, of_classes)]),
        Phase(
            "training the VQGAN",
            ("-m", "taming_dist.train", f"+experiment={demo.vqgan}", f"run.dir={vqgan}",
             f"data.train={shards / 'train'}", f"data.val={shards / 'val'}"),
            vqgan / "events.jsonl",
        ),
        *(
            Phase(
                f"tokenization, {split}",
                ("tools/tokenize_dataset.py", "--model", f"{vqgan / 'export'}", "--shards",
                 f"{shards / split}", "--out", f"{codes / split}", "--views", views,
                 "--prefix", f"codes-{split}"),
                codes / split / "manifest.json",
            )
            for split, views in (("train", demo.views), ("val", "center"))
        ),
        Phase(
            "training the transformer",
            ("-m", "taming_dist.train", f"+experiment={demo.transformer}", *conditional,
             f"run.dir={transformer}", f"data.train={codes / 'train'}",
             f"data.val={codes / 'val'}", f"data.vqgan={vqgan / 'export'}"),
            transformer / "events.jsonl",
        ),
        Phase(
            "sampling",
            ("-m", "taming_dist.sample", f"transformer={transformer / 'export'}",
             f"vqgan={vqgan / 'export'}", f"out={out / 'samples'}", "top_p=0.9", *guided,
             "seed=0", f"n={count}", f"batch={count}"),
            out / "samples" / "samples.json",
        ),
        Phase(
            "evaluation, VQGAN",
            ("-m", "taming_dist.evaluate", f"model={vqgan / 'export'}",
             f"data={shards / 'val'}", f"out={figures / 'vqgan'}"),
            figures / "vqgan" / "metrics.json",
        ),
        Phase(
            "evaluation, transformer",
            ("-m", "taming_dist.evaluate", f"model={transformer / 'export'}",
             f"data={codes / 'val'}", f"out={figures / 'transformer'}"),
            figures / "transformer" / "metrics.json",
        ),
    ]  # fmt: skip


def built_in(demo: Demo, out: Path) -> list[Phase]:
    """From the photographs of the installed packages to shards."""
    photographs, shards = out / "photographs", out / "shards"
    cutting = Phase(
        "photographs",
        ("tools/demo_photographs.py", "--out", f"{photographs}", "--size", f"{demo.size}"),
        photographs / "photographs.json",
    )
    folders = {split: photographs / split for split in ("train", "val")}
    return [cutting] + [
        Phase(
            f"image shards, {split}",
            ("tools/make_shards.py", "--images", f"{folder / 'images'}", "--labels", "folders",
             "--segmentations", f"{folder / 'segmentations'}", "--prefix", split,
             "--out", f"{shards / split}"),
            shards / split / "manifest.json",
        )
        for split, folder in folders.items()
    ]  # fmt: skip


def given(demo: Demo, out: Path, images: Path, of_classes: bool) -> Phase:
    """From a folder of photographs to shards; a tenth is for validation."""
    return Phase(
        "image shards",
        ("tools/make_shards.py", "--images", f"{images}",
         *(("--labels", "folders") if of_classes else ()), "--short-side", f"{demo.size}",
         "--val-fraction", "0.1", "--out", f"{out / 'shards'}"),
        out / "shards" / "val" / "manifest.json",
    )  # fmt: skip


def has_classes(images: Path) -> bool:
    """Whether a folder of photographs has two folders or more, which are classes then."""
    if not images.is_dir():
        raise UserError(f"--images {images}: no such folder")
    folders = [each.name for each in images.iterdir() if each.is_dir()]
    return sum(not name.startswith(".") for name in folders) > 1


def number_of_samples(shards: Path) -> int:
    """A few of each class, and as many as fit on the page where there are none or many."""
    classes = Manifest.load(shards).classes if (shards / MANIFEST).exists() else None
    return min(SAMPLES_PER_CLASS * len(classes), MOST_SAMPLES) if classes else MOST_SAMPLES


class Journal:
    """phases.json: the finished commands, with the time and memory that each took."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.records: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}

    def is_done(self, phase: Phase) -> bool:
        """Whether this exact command has finished and its result still exists."""
        record = self.records.get(phase.name)
        return record is not None and record["command"] == [*phase.command] and phase.is_complete

    def run(self, phase: Phase) -> None:
        """Run the phase and record it, including the time of interrupted attempts."""
        record = self.records.get(phase.name)
        same = record is not None and record["command"] == [*phase.command]
        spent = record["seconds"] if record is not None and same else 0.0
        start = time.monotonic()
        status, peak = run_python(phase.command)
        self.records[phase.name] = {
            "command": [*phase.command],
            "seconds": spent + time.monotonic() - start,
            "peak_memory_gb": peak,
        }
        self._save()
        if status != 0:
            sys.exit(status)
        if not phase.is_complete:
            print("\ninterrupted: the same command resumes from here")
            sys.exit(128 + signal.SIGINT)

    def _save(self) -> None:
        write_json(self.path, self.records)


def run_python(arguments: Sequence[str]) -> tuple[int, float]:
    """Run python as a child that shares our terminal; return its status and peak memory in GiB."""
    print(f"\n$ python {shlex.join(arguments)}", flush=True)
    child = subprocess.Popen([sys.executable, *arguments])
    while True:
        try:
            _, status, usage = os.wait4(child.pid, 0)
            break
        except KeyboardInterrupt:  # the child receives it too: training saves and ends
            continue
    code = os.waitstatus_to_exitcode(status)
    child.returncode = code
    return code, usage.ru_maxrss * 1024 / GIB


def summarize(out: Path, journal: Journal) -> dict[str, Any]:
    """summary.json: the metrics of the chain, from the files that its commands wrote."""
    moments: dict[int, dict[str, Any]] = {}  # training and validation have a line each
    for row in map(json.loads, (out / "vqgan" / "metrics.jsonl").read_text().splitlines()):
        moments.setdefault(row["samples"], {}).update(row)
    measured = [moment for moment in moments.values() if "val/lpips" in moment]
    before = [row for row in measured if not has_gan(row)]
    figures = {
        **json.loads((out / "evaluation" / "vqgan" / "metrics.json").read_text()),
        **json.loads((out / "evaluation" / "transformer" / "metrics.json").read_text()),
    }
    return {
        **{name: value for name, value in figures.items() if isinstance(value, float)},
        "lpips_before_gan": before[-1]["val/lpips"],
        "lpips_after_gan": measured[-1]["val/lpips"],
        "gan_started_after_step": before[-1]["step"],
        "classes": list(Manifest.load(out / "shards" / "train").classes or ()),
        "seconds": {name: record["seconds"] for name, record in journal.records.items()},
        "peak_memory_gb": max(record["peak_memory_gb"] for record in journal.records.values()),
    }


def has_gan(row: dict[str, Any]) -> bool:
    """Whether the GAN was active in the steps that a log point covers."""
    return "train/gan_g" in row


def main(argv: Sequence[str] | None = None) -> None:
    """Run the chain."""
    parser = cli.Parser(description=__doc__.partition("\n")[0])
    parser.add_argument("--gpu", action="store_true", help="128 px, on one GPU")
    parser.add_argument("--images", type=Path, help="folder of photographs instead of the built-in")
    parser.add_argument("--out", type=Path, help="folder of all results")
    parser.add_argument("--list", action="store_true", help="print the commands, run none")
    args = parser.parse_args(argv)
    demo = ON_GPU if args.gpu else ON_CPU
    out: Path = args.out or demo.out
    images: Path | None = args.images
    if not Path("tools/demo.py").is_file():
        raise UserError("run the demo from the folder of the repository: make demo")
    if images is not None and not args.gpu:
        raise UserError("--images is for --gpu: two cores learn too little of other photographs")
    if args.list:
        for phase in phases(demo, out, images):
            print(f"python {shlex.join(phase.command)}")
        return
    if args.gpu and not torch.cuda.is_available():
        raise UserError("--gpu: torch sees no GPU here; make demo runs on the CPU")
    out.mkdir(parents=True, exist_ok=True)
    journal = Journal(out / "phases.json")
    for number in range(len(phases(demo, out, images))):
        phase = phases(demo, out, images)[number]  # again: now the shards may be there
        if journal.is_done(phase):
            print(f"{phase.name}: already done", flush=True)
        else:
            journal.run(phase)
    summary = summarize(out, journal)
    write_json(out / "summary.json", summary)
    write_page(
        out / "report.html", "taming_dist: from photographs to new images",
        [out / "vqgan", out / "transformer"], summary, [out / "evaluation" / "vqgan"],
        out / "samples",
    )  # fmt: skip
    print(farewell(out, summary))


def farewell(out: Path, summary: dict[str, Any]) -> str:
    """Where the report is, and what to try next."""
    one_class = " class_id=0" if summary["classes"] else ""
    return f"""
The chain took {sum(summary["seconds"].values()):.0f} s. Open the report:

  {(out / "report.html").resolve()}

Try next:
  .venv/bin/python -m taming_dist.sample transformer={out}/transformer/export \\
      vqgan={out}/vqgan/export out=outputs/more n=16 seed=1{one_class}
  .venv/bin/python tools/make_shards.py --images YOUR_PHOTOGRAPHS --short-side 256 --out data/mine
  .venv/bin/python -m taming_dist.train +experiment=flickr +scale=laptop \\
      data.train=data/mine data.val=data/mine run.name=mine"""


if __name__ == "__main__":
    cli.run(main)
