"""A chaos trial: real training is killed at random moments until it is finished all the same, and
has to end as if nobody had disturbed it.

    python tools/chaos.py [--stage prior] [--kills 200] [--zero 0 1 2 3] [--ranks 1 2 4]
        [--change] [--steps 40] [--data SPEC] [--seed 0] [--out outputs/chaos] [KEY=VALUE ...]

For each ZeRO stage and number of ranks there is an undisturbed run, and runs of the same training
whose ranks are killed (SIGKILL), one of them or all at once, half of the time in the middle of a
save, and started again. Their logs, models and checkpoints must be the same to the bit, and every
global batch must have had the same samples in every start. With --change each start has another
number of ranks and another ZeRO stage, and losses and weights must agree within rounding. The
training is tiny (tools/trials/training.py), over data that is made for it or is given (SPEC), and
can be overridden. Ends with a table, OUT/figures.json, and exit status 1 if anything differed.
"""

import argparse
import dataclasses
import itertools
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from trials.comparing import Distance, differing_bits, differing_samples, distance
from trials.figures import HEADER, Figures, figures_of, row, together
from trials.group import Shape, imported
from trials.killing import Broken, run_disturbed, run_undisturbed
from trials.training import MAKERS, UNCUT, arguments, new_folder

from taming_dist import cli
from taming_dist.formats.strict_json import write_json

# What rounding may do within 40 steps whose ranks change (measured: docs/results.md).
STAGE = cli.number(int, at_least=0, at_most=3)  # of ZeRO
TOLERANCE = Distance(losses=1e-5, weights=1e-4)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments of the command."""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=sorted(MAKERS), default="prior", help="what is trained")
    parser.add_argument("--kills", type=cli.COUNT, default=200, help="of all runs together")
    parser.add_argument("--zero", type=STAGE, nargs="+", default=[0, 1, 2, 3])
    parser.add_argument("--ranks", type=cli.COUNT, nargs="+", default=[1, 2, 4])
    parser.add_argument("--change", action="store_true", help="ranks and ZeRO at each start")
    parser.add_argument("--steps", type=cli.COUNT, default=40, help="of each run")
    parser.add_argument("--data", help="shards to train on, instead of made ones")
    parser.add_argument("--seed", type=cli.SEED, default=0, help="of the kills")
    parser.add_argument("--out", type=Path, default=Path("outputs/chaos"), help="a new folder")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of the training")
    return parser.parse_args(argv)


@dataclasses.dataclass
class Trial:
    """Runs of one kind that were killed again and again, their folders below `out`.

    `wrong`: what differed from the undisturbed run; `furthest`: by how much, where rounding may
    differ.
    """

    name: str
    out: Path
    figures: list[Figures] = dataclasses.field(default_factory=list)
    wrong: list[str] = dataclasses.field(default_factory=list)
    furthest: Distance | None = None

    def run(
        self, shapes: list[Shape], command: list[str], kills: int, chance: random.Random
    ) -> None:
        """Make the undisturbed run, of the first of the shapes, and others, each start of any of
        them, until so many kills are made."""
        reference = self.out / "undisturbed"
        run_undisturbed(reference, shapes[0], command)
        made = 0
        while made < kills:
            folder = self.out / f"killed-{len(self.figures)}"
            run = run_disturbed(folder, shapes, command, kills - made, chance)
            self.figures.append(figures_of(run))
            made += len(run.kills)
            differing = self.rounded if len(shapes) > 1 else differing_bits
            self.wrong += [f"{folder}: {what}" for what in differing(folder, reference)]

    def record(self) -> dict[str, Any]:
        """For figures.json."""
        furthest = dataclasses.asdict(self.furthest) if self.furthest else None
        runs = [dataclasses.asdict(one) | {"goodput": one.goodput} for one in self.figures]
        return {"wrong": self.wrong, "furthest": furthest, "runs": runs}

    def rounded(self, folder: Path, reference: Path) -> list[str]:
        """What differs from the undisturbed run by more than rounding."""
        found = distance(folder, reference)
        self.furthest = found if self.furthest is None else self.furthest.beyond(found)
        return differing_samples(folder, reference) + found.above(TOLERANCE)


def trials(given: argparse.Namespace, out: Path) -> Iterator[Trial]:
    """Make the trials of a command."""
    data = given.data
    if data is None:
        data = out / "data"
        MAKERS[given.stage](data, np.random.default_rng(0))
    overrides = [*(UNCUT[given.stage] if given.change else []), *given.overrides]
    command = arguments(given.stage, data, given.steps, overrides)
    chance = random.Random(given.seed)
    shapes = [Shape(*one) for one in itertools.product(given.zero, given.ranks)]
    kinds = [shapes] if given.change else [[shape] for shape in shapes]
    for number, kind in enumerate(kinds):
        kills = len(range(number, given.kills, len(kinds)))  # one more for the first, at most
        name = "changing" if given.change else str(kind[0])
        trial = Trial(name, out / name.replace(", ", "-").replace(" ", ""))
        try:
            trial.run(kind, command, kills, chance)
        except Broken as error:
            trial.wrong.append(str(error))
        yield trial


def main(argv: Sequence[str] | None = None) -> None:
    """Make the trials, and tell."""
    given = parse(argv)
    out = new_folder(given.out)
    made = []
    with imported():
        print(HEADER, flush=True)
        for trial in trials(given, out):
            made.append(trial)
            tell(trial)
            write_json(out / "figures.json", {one.name: one.record() for one in made})
    if len(made) > 1 and any(trial.figures for trial in made):
        print(row("all", together([one for trial in made for one in trial.figures])))
    if any(trial.wrong for trial in made):
        sys.exit(cli.EXIT_ERROR)


def tell(trial: Trial) -> None:
    """Print what a trial has shown."""
    if trial.figures:
        print(row(trial.name, together(trial.figures)), flush=True)
    if trial.furthest is not None:
        print(
            f"differences at most: losses {trial.furthest.losses:.1e}, weights "
            f"{trial.furthest.weights:.1e}"
        )
    for what in trial.wrong:
        print(f"error: {trial.name}: {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    cli.run(main)
