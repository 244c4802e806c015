"""Measure, each comparison within one run: `make bench` runs `steps`.

    python tools/benchmark.py steps [--steps 12] [--out FILE]
    python tools/benchmark.py making [--images 2000] [--out FILE]
    python tools/benchmark.py codes [--shards 16] [--images 64] [--out FILE]
    python tools/benchmark.py data [--images 4096] [--out FILE]
    python tools/benchmark.py decoding [--size 1024] [--rows 16 64 256] [--out FILE]
    python tools/benchmark.py sampling [--threads 2] [--layers 6] [--width 512] [--out FILE]
    python tools/benchmark.py saving [--saves 3] [--size "25 M"] [--out FILE]
    python tools/benchmark.py window [--codes 64] [--steps 1 2 4] [--out FILE]

Every module of tools/benchmarks is a benchmark, named by the first argument. It prints a table;
--out writes the results as JSON.
"""

from collections.abc import Sequence
from pathlib import Path

# this folder is on the path of a script that lies in it
from benchmarks import codes, data, decoding, making, memory, sampling, saving, steps, window

from taming_dist import cli
from taming_dist.formats.strict_json import write_json

BENCHMARKS = {
    "codes": codes,
    "data": data,
    "decoding": decoding,
    "making": making,
    "memory": memory,
    "sampling": sampling,
    "saving": saving,
    "steps": steps,
    "window": window,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark that is asked for."""
    parser = cli.Parser(description=__doc__.partition("\n")[0])
    chosen = parser.add_subparsers(dest="benchmark", required=True)
    for name, module in BENCHMARKS.items():
        one = chosen.add_parser(name, help=str(module.__doc__).partition(": ")[2].splitlines()[0])
        one.add_argument("--out", type=Path, help="also write the results as JSON")
        module.add_arguments(one)
    arguments = parser.parse_args(argv)
    figures = BENCHMARKS[arguments.benchmark].run(arguments)
    if arguments.out is not None and figures is not None:
        write_json(arguments.out, figures)


if __name__ == "__main__":
    cli.run(main)
