"""What `python -m taming_dist.train --help` prints, without importing what training needs."""

import textwrap
from collections.abc import Iterator
from pathlib import Path

WIDTH = 100
GROUPS_OF_A_RUN = ("experiment", "scale", "debug", "speedrun", "comparison")  # added with a plus
COMMANDS = ("evaluate",)  # whose own configuration lies in a folder of their name

HELP = """\
Train a VQGAN (stage 1) or a transformer on its codes (stage 2); the same command resumes a run.

    python -m taming_dist.train +experiment=NAME [+scale=laptop] [group=choice ...] [key=value ...]

run.dir (outputs/<run.name>) gets metrics, previews, checkpoints and the model (export/).

    ... --cfg job          print all keys of this configuration with their values, and do nothing
    ... --config-dir DIR   also look for experiments and other choices in a folder of your own
    ... +dry_run=true      check it, and print parameters and memory
    ... +debug=profile     trace some steps

Choices (docs/experiments.md, docs/extending.md):

{choices}
"""


def conf_dir() -> Path:
    """The folder of the YAML files: inside the package in a wheel, beside it in a checkout."""
    package = Path(__file__).resolve().parent
    return package / "conf" if (package / "conf").is_dir() else package.parent / "conf"


def usage() -> str:
    """The text of --help, with the choices that there are in conf/."""
    return HELP.format(choices="\n".join(choices(conf_dir())))


def choices(folder: Path) -> Iterator[str]:
    """A paragraph for each config group of training."""
    groups = sorted({file.parent.relative_to(folder) for file in folder.glob("*/**/*.yaml")})
    for group in groups:
        name = group.as_posix()
        if name in COMMANDS:
            continue
        plus = "+" if name in GROUPS_OF_A_RUN else ""
        known = ", ".join(sorted(file.stem for file in (folder / group).glob("*.yaml")))
        yield textwrap.fill(f"{plus}{name}= {known}", WIDTH, subsequent_indent="    ")
