"""Compare tokenizers: recipes trained on the same images in the same order, and measured alike.

    python tools/compare_tokenizers.py run simvq vector fsq --images DIR --out outputs/comparison
    python tools/compare_tokenizers.py table DIR --into docs/choosing-a-tokenizer.md

`run` trains recipes of conf/comparison and conf/speedrun, each with all seeds, as
conf/experiment/comparison.yaml says, and writes their records, the table with the spread over
seeds, and a picture of reconstructions side by side. The same command goes on where it was
interrupted; what has a record of the same commit is not trained again. `table` shows the records of
folders (docs/choosing-a-tokenizer.md).
"""

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from benchmarks.tables import write_into
from speedruns.compared import markdown
from speedruns.pictured import draw
from speedruns.records import Record, load, save
from speedruns.running import Asked, make_shards, recipes, run_probe, run_recipe, this_code

from taming_dist import cli
from taming_dist.errors import UserError

EXPERIMENT = "comparison"
GROUPS = recipes("comparison", "speedrun")
PICTURE = "reconstructions.png"


def main() -> None:
    """Run recipes, or show records."""
    parser = cli.Parser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="train recipes and write their records")
    run.add_argument("recipes", nargs="+", choices=sorted(GROUPS), metavar="RECIPE")
    run.add_argument("--images", type=Path, required=True, help="a folder with train/ and val/")
    run.add_argument("--out", type=Path, required=True, help="gets the shards and the runs")
    run.add_argument("--records", type=Path, help="gets records and the picture (OUT/records)")
    run.add_argument("--seeds", type=cli.SEED, nargs="+", default=[23, 24])
    run.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="keys of training")
    run.add_argument(
        "--probe", nargs="*", metavar="KEY=VALUE",
        help="also measure the codes by taming_dist.evaluate probe=true, with these keys",
    )  # fmt: skip
    table = commands.add_parser("table", help="show records side by side")
    table.add_argument("records", type=Path, nargs="+", help="folders of records")
    table.add_argument("--into", type=Path, help="a document that has marks for it")
    arguments = parser.parse_args()
    (compare if arguments.command == "run" else show)(arguments)


def compare(arguments: argparse.Namespace) -> None:
    """Train what has no record yet, and show all."""
    for name in ("recipes", "seeds"):
        given = getattr(arguments, name)
        if twice := [each for each in given if given.count(each) > 1]:
            raise UserError(f"{name}: {twice[0]} is there twice, name it once")
    asked = Asked(EXPERIMENT, arguments.out, arguments.set, arguments.probe)
    records: Path = arguments.records or asked.out / "records"
    make_shards(arguments.images, asked)
    found = [
        finished(asked, recipe, seed, records) or measured(asked, recipe, seed, records)
        for seed in arguments.seeds
        for recipe in arguments.recipes
    ]
    first = arguments.seeds[0]
    exports = {name: asked.folder(name, first) / "export" for name in arguments.recipes}
    draw(exports, asked.shards("val"), records / PICTURE)
    print(markdown(found))
    print(f"wrote {records}")


def finished(asked: Asked, recipe: str, seed: int, records: Path) -> Record | None:
    """The record of this run by this code, if there is one."""
    now = this_code()
    wanted = (recipe, seed, list(asked.overrides), now.commit, list(now.changed))
    for each in load(records) if records.is_dir() and any(records.glob("*.json")) else ():
        run = each.run
        its = (each.recipe, each.seed, list(each.overrides), run.commit, list(run.changed))
        probed = None if each.probe is None else list(each.probe.asked)
        if its == wanted and asked.probe in (None, probed):
            return each
    return None


def measured(asked: Asked, recipe: str, seed: int, records: Path) -> Record:
    """Train, and write the record."""
    record = run_recipe(asked, GROUPS[recipe], recipe, seed)
    if asked.probe is not None:
        record = dataclasses.replace(record, probe=run_probe(asked, asked.folder(recipe, seed)))
    print(f"wrote {save(record, records)}", flush=True)
    return record


def show(arguments: argparse.Namespace) -> None:
    """Print the tables, or put them into a document."""
    folders: Sequence[Path] = arguments.records
    text = "\n\n".join(markdown(load(folder)) for folder in folders)
    if arguments.into is None:
        print(text)
    else:
        write_into(arguments.into, text)


if __name__ == "__main__":
    cli.run(main)
