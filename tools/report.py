"""Make one self-contained page that compares runs: curves, previews, cost, configurations.

The page needs no network and no other file; it follows the reader's light or dark setting, and
without scripts its charts stand still (docs/reports.md).

    python tools/report.py outputs/demo/vqgan outputs/demo/transformer --out report.html \
        [--summary summary.json] [--evaluation DIR ...] [--samples DIR]

Figures of several evaluations stand side by side, each with the hash of its protocol
(docs/evaluation.md); figures of different protocols are refused.
"""

from pathlib import Path

# this folder is on the path of a script that lies in it
from reports.page import write_page

from taming_dist import cli
from taming_dist.errors import UserError
from taming_dist.formats.strict_json import read_json


def main() -> None:
    """Read the runs named on the command line and write the page."""
    parser = cli.Parser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="+", help="run directories (run.dir)")
    parser.add_argument("--out", type=Path, required=True, help="the page to write")
    parser.add_argument("--summary", type=Path, help="summary.json of the demo")
    parser.add_argument(
        "--evaluation", type=Path, nargs="+", default=[], help="out folders of taming_dist.evaluate"
    )
    parser.add_argument("--samples", type=Path, help="out folder of taming_dist.sample")
    parser.add_argument("--title", default="taming_dist: a report")
    args = parser.parse_args()
    summary = read_json(args.summary) if args.summary else {}
    if not isinstance(summary, dict):
        raise UserError(f"{args.summary} is no summary: give the summary.json of the demo")
    write_page(args.out, args.title, args.runs, summary, args.evaluation, args.samples)
    print(f"wrote {args.out} ({args.out.stat().st_size / 1e6:.1f} MB)")


if __name__ == "__main__":
    cli.run(main)
