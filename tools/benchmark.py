"""Measure, each comparison within one run: `make bench` runs `all`.

    python tools/benchmark.py stage1 [--baseline] [--cases step encode] [--out FILE]
    python tools/benchmark.py stage2 [--baseline] [--engine zero=2 graphs=true] [--out FILE]
    python tools/benchmark.py all [--out FILE]
    python tools/benchmark.py table FILE [--into docs/speed.md]
    python tools/benchmark.py allocator [--steps 12] [--out FILE]
    python tools/benchmark.py making [--images 2000] [--out FILE]
    python tools/benchmark.py codes [--shards 16] [--images 64] [--out FILE]
    python tools/benchmark.py data [--images 4096] [--out FILE]
    python tools/benchmark.py decoding [--size 1024] [--rows 16 64 256] [--out FILE]
    python tools/benchmark.py sampling [--threads 2] [--layers 6] [--width 512] [--out FILE]
    python tools/benchmark.py saving [--saves 3] [--size "25 M"] [--out FILE]
    python tools/benchmark.py scaling [--ranks 1 2 4 8] [--zero 0 2] [--out FILE]
    python tools/benchmark.py forecast [--overlap 0.8] [--into docs/scaling.md]
    python tools/benchmark.py window [--codes 64] [--steps 1 2 4] [--out FILE]

Every module of tools/benchmarks that is listed here is a benchmark, named by the first argument. It
prints a table; --out writes the results as JSON: rows (`benchmarks.rows`), which `table` makes
Markdown of, or of some the figures by name.
"""

from collections.abc import Sequence
from pathlib import Path

# this folder is on the path of a script that lies in it
from benchmarks import (
    allocator,
    codes,
    data,
    decoding,
    forecast,
    making,
    memory,
    sampling,
    saving,
    scaling,
    stage1,
    stage2,
    suite,
    tables,
    window,
)
from benchmarks.rows import Rows, save

from taming_dist import cli
from taming_dist.formats.strict_json import write_json

BENCHMARKS = {
    "all": suite,
    "allocator": allocator,
    "codes": codes,
    "data": data,
    "decoding": decoding,
    "forecast": forecast,
    "making": making,
    "memory": memory,
    "sampling": sampling,
    "saving": saving,
    "scaling": scaling,
    "stage1": stage1,
    "stage2": stage2,
    "table": tables,
    "window": window,
}


def main(argv: Sequence[str] | None = None) -> None:
    """Run the benchmark that is asked for."""
    parser = cli.Parser(description=__doc__.partition("\n")[0])
    chosen = parser.add_subparsers(dest="benchmark", required=True)
    for name, module in BENCHMARKS.items():
        one = chosen.add_parser(name, help=str(module.__doc__).partition(": ")[2].splitlines()[0])
        if module not in (tables, forecast):  # which measure nothing
            one.add_argument("--out", type=Path, help="also write the results as JSON")
        module.add_arguments(one)
    arguments = parser.parse_args(argv)
    found = BENCHMARKS[arguments.benchmark].run(arguments)
    if found is None or arguments.out is None:
        return
    if isinstance(found, Rows | list):
        save(arguments.out, [found] if isinstance(found, Rows) else found)
    else:
        write_json(arguments.out, found)


if __name__ == "__main__":
    cli.run(main)
