"""Running a recipe of conf/ on a folder of images, from shards to its record."""

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.machine import default_device, describe
from benchmarks.rows import Run, this_run

from speedruns.records import Probe, Record, begin, read_run
from taming_dist.errors import UserError
from taming_dist.formats.strict_json import read_json
from taming_dist.usage import conf_dir

TOOLS = Path(__file__).resolve().parents[1]
PARTS = ("train", "val")


@dataclass(frozen=True)
class Asked:
    """What all recipes share: the file of conf/experiment, the folder `out`, which gets shards and
    runs, the keys of training that were changed, and those of a probe (None: there is none)."""

    experiment: str
    out: Path
    overrides: Sequence[str]
    probe: Sequence[str] | None = None

    def shards(self, part: str) -> Path:
        """The shards of a part of the images."""
        return self.out / "shards" / part

    def folder(self, recipe: str, seed: int) -> Path:
        """That of a run."""
        return self.out / f"{recipe}-seed{seed}"


def recipes(*groups: str) -> dict[str, str]:
    """The groups of conf/ in which recipes lie, by their names."""
    return {
        file.stem: group for group in groups for file in sorted((conf_dir() / group).glob("*.yaml"))
    }


def this_code() -> Run:
    """The commit and the machine that a run begins with."""
    return this_run(describe(default_device(), {}))


def make_shards(images: Path, asked: Asked) -> None:
    """Shards of the images in the folders train/ and val/; those that are there are kept.

    Raises:
        UserError: a folder is missing.
    """
    for part in PARTS:
        if not (images / part).is_dir():
            raise UserError(f"--images: there is no folder {images / part}")
    for part in PARTS:
        python(
            f"{TOOLS / 'make_shards.py'}", "--images", f"{images / part}", "--labels", "folders",
            "--prefix", part, "--out", f"{asked.shards(part)}",
        )  # fmt: skip


def run_recipe(asked: Asked, group: str, recipe: str, seed: int) -> Record:
    """Train a recipe of a group of conf/, or go on with its run, and read its record.

    Raises:
        UserError: the run was begun by other code.
    """
    folder = asked.folder(recipe, seed)
    begin(folder, this_code())
    python(
        "-m", "taming_dist.train", f"+experiment={asked.experiment}", f"+{group}={recipe}",
        f"run.dir={folder}", f"run.seed={seed}",
        *(f"data.{part}={asked.shards(part)}" for part in PARTS), *asked.overrides,
    )  # fmt: skip
    return read_run(folder, recipe, seed, asked.overrides)


def run_probe(asked: Asked, folder: Path) -> Probe:
    """Make codes of all images with the export of a run, and measure them by a probe."""
    assert asked.probe is not None
    codes = {part: folder / "codes" / part for part in PARTS}
    for part in PARTS:
        python(
            f"{TOOLS / 'tokenize_dataset.py'}", "--model", f"{folder / 'export'}", "--shards",
            f"{asked.shards(part)}", "--prefix", part, "--out", f"{codes[part]}",
        )  # fmt: skip
    samples = [f"vqgan={folder / 'export'}", f"reference={asked.shards('val')}"]
    python(
        "-m", "taming_dist.evaluate", "probe=true", f"train={codes['train']}",
        f"data={codes['val']}", f"out={folder / 'probe'}", *asked.probe,
        *(samples if any(word.startswith("n=") for word in asked.probe) else []),
    )  # fmt: skip
    found = read_json(folder / "probe/metrics.json")
    figures = {name: value for name, value in found.items() if name.startswith("probe_")}
    hashes = [each["hash"] for each in found["protocols"] if "probe_nll" in each["figures"]]
    return Probe(list(asked.probe), hashes[0], figures)


def python(*arguments: str) -> None:
    """Run python as a child that shares our terminal; end with its status if it fails."""
    status = subprocess.run([sys.executable, *arguments], check=False).returncode
    if status:
        sys.exit(status)
