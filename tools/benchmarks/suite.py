"""`tools/benchmark.py all`: those of the table in docs/speed.md, one after the other.

Each in a process of its own and in its short form, which takes a minute or two.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import codes, data, sampling, scaling, stage1, stage2
from benchmarks.rows import Rows, load
from taming_dist.errors import UserError

SHORT = {
    "stage1": stage1.SHORT,
    "data": data.SHORT,
    "codes": codes.SHORT,
    "stage2": stage2.SHORT,
    "sampling": sampling.SHORT,
    "scaling": scaling.SHORT,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--only", nargs="+", choices=SHORT, default=list(SHORT), help="some of them"
    )


def run(arguments: argparse.Namespace) -> list[Rows]:
    """Run them and give the rows of each."""
    found: list[Rows] = []
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.only:
            out = Path(folder) / f"{name}.json"
            command = [sys.executable, sys.argv[0], name, *SHORT[name], "--out", str(out)]
            print(f"\n{' '.join(command[2:-2])}", flush=True)
            if subprocess.run(command, check=False).returncode != 0:
                raise UserError(
                    f"the benchmark {name} failed, see above; run it alone to repeat it"
                )
            found += load(out)
    return found
