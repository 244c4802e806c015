"""Time to rFID: train a recipe of conf/speedrun on a fixed data set, measured alike.

    python tools/speedrun.py run ours --images DIR --out outputs/speedrun [--seed 23]
    python tools/speedrun.py table docs/speedrun --into docs/speedrun.md

`run` makes shards of the images in DIR/train and DIR/val, trains, and writes the record of the run
and its log; the same command goes on where it was interrupted. `table` shows records side by side,
and draws their courses beside the document (docs/speedrun.md).
"""

import argparse
from pathlib import Path

from benchmarks.tables import write_into
from speedruns.records import load, save, save_log
from speedruns.running import Asked, make_shards, recipes, run_recipe
from speedruns.shown import draw, markdown

from taming_dist import cli

GROUP = "speedrun"  # of conf/, and the experiment that its recipes share


def main() -> None:
    """Run a recipe, or show records."""
    parser = cli.Parser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="train a recipe and write its record")
    run.add_argument("recipe", choices=sorted(recipes(GROUP)))
    run.add_argument("--images", type=Path, required=True, help="a folder with train/ and val/")
    run.add_argument("--out", type=Path, required=True, help="gets the shards and the run")
    run.add_argument("--records", type=Path, help="gets the record and its log (OUT/records)")
    run.add_argument("--seed", type=cli.SEED, default=23)
    run.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="keys of training")
    table = commands.add_parser("table", help="show records side by side")
    table.add_argument("records", type=Path, help="a folder of records")
    table.add_argument("--into", type=Path, help="a document with marks; gets a .png beside it")
    arguments = parser.parse_args()
    (measure if arguments.command == "run" else show)(arguments)


def measure(arguments: argparse.Namespace) -> None:
    """Make the shards, train, and write the record."""
    asked = Asked(GROUP, arguments.out, arguments.set)
    make_shards(arguments.images, asked)
    record = run_recipe(asked, GROUP, arguments.recipe, arguments.seed)
    records = arguments.records or asked.out / "records"
    record = save_log(record, asked.folder(record.recipe, record.seed), records)
    file = save(record, records)
    print(markdown([record]))
    print(f"wrote {file}")


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
