"""What two ranks send each other in a step of either stage: `python scaling_worker.py OUT`."""

import argparse
import json
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))
from benchmarks import scaling, worlds  # noqa: E402

SMALL = ["--steps", "1", "--batch", "1", "--layers", "2", "--width", "64", "--tokens", "16",
         "--size", "32"]  # fmt: skip
STAGES = {"1": ["--zero", "0", "3"], "2": ["--accumulation", "2"]}

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    scaling.add_arguments(parser)
    worlds.prepare()
    found = {}
    for stage, options in STAGES.items():
        arguments = parser.parse_args([*SMALL, *options])
        first, _ = worlds.launch(partial(scaling.measure, arguments, int(stage)), 2)
        found[stage] = first["zero"]
    Path(sys.argv[1]).write_text(json.dumps(found))
