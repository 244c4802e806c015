"""W&B's own steps: where a run was when it had seen so many images, so that it can be rewound."""

import json
from pathlib import Path

from taming_dist.formats.strict_json import json_lines

FILE = "wandb-steps.jsonl"


class Steps:
    """run.dir/wandb-steps.jsonl: for each row that W&B has got, the images seen and its step
    there."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / FILE

    def note(self, images: int, step: int) -> None:
        """A row was logged."""
        with open(self.path, "ab") as file:
            file.write(json.dumps({"samples": images, "step": step}).encode() + b"\n")

    def before(self, images: int) -> int | None:
        """The step of the last row that comes before all that have seen more images; None where
        there is none, or no row has seen more: then there is nothing to rewind."""
        if not self.path.is_file():
            return None
        last = None
        for _, row in json_lines(self.path):
            if row is None or not isinstance(row.get("step"), int):
                continue
            if row["samples"] > images:
                return last
            last = row["step"]
        return None
