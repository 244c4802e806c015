"""Training that is killed in any call of the file system ends as if nobody had disturbed it.

    python tools/chaos_calls.py [--stage prior] [--zero 1] [--ranks 2] [--steps 7] [--most 0]
        [--data SPEC] [--seed 0] [--out outputs/chaos-calls] [KEY=VALUE ...]

An undisturbed run writes down each call of the file system of each of its ranks that concerns its
folder: folders made, files opened, written, synced, renamed and removed, for logs, checkpoints and
exports. Then, for each of them (--most: for so many of all kinds, drawn at random), one more run:
that rank is killed there, in the middle of what it writes, the others are killed with it or asked
to end, and the run is started again. Its log, models, last checkpoint and samples must be the same
to the bit. `tools/chaos.py` kills at random moments. Ends with a line of figures, OUT/figures.json,
and exit status 1 if anything differed; runs in which nothing did are removed.
"""

import argparse
import random
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from trials.calls import calls_of, run_cut, sampled
from trials.comparing import differing_bits
from trials.group import Shape, imported
from trials.killing import Broken
from trials.training import MAKERS, arguments, new_folder

from taming_dist import cli
from taming_dist.formats.strict_json import write_json

TOLD = 0.25  # the part of the kills after which the other ranks are asked to end


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments of the command."""
    parser = cli.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stage", choices=sorted(MAKERS), default="prior", help="what is trained")
    parser.add_argument("--zero", type=cli.number(int, at_least=0, at_most=3), default=1)
    parser.add_argument("--ranks", type=cli.COUNT, default=2)
    parser.add_argument("--steps", type=cli.COUNT, default=7, help="of each run")
    most = cli.number(int, at_least=0)
    parser.add_argument("--most", type=most, default=0, help="calls at which to kill; 0: at each")
    parser.add_argument("--data", help="shards to train on, instead of made ones")
    parser.add_argument("--seed", type=cli.SEED, default=0, help="of what is drawn")
    parser.add_argument(
        "--out", type=Path, default=Path("outputs/chaos-calls"), help="a new folder"
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="of the training")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Make the runs, and tell."""
    given = parse(argv)
    out = new_folder(given.out)
    data = given.data or out / "data"
    if given.data is None:
        MAKERS[given.stage](data, np.random.default_rng(0))
    command = arguments(given.stage, data, given.steps, given.overrides)
    shape, chance = Shape(given.zero, given.ranks), random.Random(given.seed)
    reference = out / "undisturbed"
    found: dict[str, list[str]] = {"wrong": [], "missed": []}
    with imported():
        calls = calls_of(reference, shape, command)
        drawn = sampled(calls, given.most, chance)
        for number, (rank, call) in enumerate(drawn):
            run_dir, told = out / f"cut-{number:04d}", chance.random() < TOLD
            what = f"rank {rank}, {call}"
            try:
                if not run_cut(run_dir, shape, command, rank, call, told):
                    found["missed"].append(what)
                wrong = differing_bits(run_dir, reference)
            except Broken as error:
                wrong = [str(error)]
            if wrong:
                found["wrong"].append(f"{run_dir.name}, {what}: {'; '.join(wrong)}")
                print(f"error: {found['wrong'][-1]}", file=sys.stderr, flush=True)
                continue
            shutil.rmtree(run_dir)
            shutil.rmtree(run_dir.with_name(f"{run_dir.name}-starts"))
    every = sum(map(len, calls))
    killed = len(drawn) - len(found["missed"])
    print(
        f"{given.stage}, {shape}: {every} calls, {len(drawn)} tried, killed at {killed} (others "
        f"did not come again), {len(found['wrong'])} runs differed"
    )
    write_json(out / "figures.json", {"calls": every, "tried": len(drawn)} | found)
    if found["wrong"]:
        sys.exit(cli.EXIT_ERROR)


if __name__ == "__main__":
    cli.run(main)
