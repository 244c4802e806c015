"""Time to rFID: train a recipe of conf/speedrun on a fixed data set, measured alike.

    python tools/speedrun.py run ours --images DIR --out outputs/speedrun [--seed 23]
    python tools/speedrun.py table docs/speedrun --into docs/speedrun.md

`run` makes shards of the images in DIR/train and DIR/val, trains, and writes the record of the run
and its log; the same command goes on where it was interrupted. `table` shows records side by side,
and draws their courses beside the document (docs/speedrun.md).
"""

import argparse
import subprocess
import sys
from pathlib import Path

from benchmarks.machine import default_device, describe
from benchmarks.rows import this_run
from benchmarks.tables import write_into
from speedruns.records import begin, load, read_run, save
from speedruns.shown import draw, markdown

from taming_dist import cli
from taming_dist.errors import UserError
from taming_dist.usage import conf_dir

TOOLS = Path(__file__).resolve().parent
PARTS = ("train", "val")


def main() -> None:
    """Run a recipe, or show records."""
    parser = cli.Parser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="train a recipe and write its record")
    recipes = sorted(file.stem for file in (conf_dir() / "speedrun").glob("*.yaml"))
    run.add_argument("recipe", choices=recipes)
    run.add_argument("--images", type=Path, required=True, help="a folder with train/ and val/")
    run.add_argument("--out", type=Path, required=True, help="gets the shards and the run")
    run.add_argument("--records", type=Path, help="gets the record and its log (OUT/records)")
    run.add_argument("--seed", type=cli.SEED, default=23)
    run.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="keys of training")
    table = commands.add_parser("table", help="show records side by side")
    table.add_argument("records", type=Path, help="a folder of records")
    table.add_argument("--into", type=Path, help="a document with marks; gets a .png beside it")
    arguments = parser.parse_args()
    (run_recipe if arguments.command == "run" else show)(arguments)


def run_recipe(arguments: argparse.Namespace) -> None:
    """Make the shards, train, and write the record."""
    out: Path = arguments.out
    for part in PARTS:
        if not (arguments.images / part).is_dir():
            raise UserError(f"--images: there is no folder {arguments.images / part}")
    folder = out / f"{arguments.recipe}-seed{arguments.seed}"
    begin(folder, this_run(describe(default_device(), {})))
    for part in PARTS:
        python(
            f"{TOOLS / 'make_shards.py'}", "--images", f"{arguments.images / part}",
            "--labels", "folders", "--prefix", part, "--out", f"{out / 'shards' / part}",
        )  # fmt: skip
    python(
        "-m", "taming_dist.train", "+experiment=speedrun", f"+speedrun={arguments.recipe}",
        f"run.dir={folder}", f"run.seed={arguments.seed}",
        *(f"data.{part}={out / 'shards' / part}" for part in PARTS), *arguments.set,
    )  # fmt: skip
    record = read_run(folder, arguments.recipe, arguments.seed, arguments.set)
    file = save(record, folder, arguments.records or out / "records")
    print(markdown([record]))
    print(f"wrote {file}")


def python(*arguments: str) -> None:
    """Run python as a child that shares our terminal; end with its status if it fails."""
    status = subprocess.run([sys.executable, *arguments], check=False).returncode
    if status:
        sys.exit(status)


def show(arguments: argparse.Namespace) -> None:
    """Print the tables, or put them into a document and draw the courses beside it."""
    records = load(arguments.records)
    if arguments.into is None:
        print(markdown(records))
        return
    write_into(arguments.into, markdown(records))
    draw(records, arguments.into.with_suffix(".png"))


if __name__ == "__main__":
    cli.run(main)
