"""W&B's own steps: where a run was when it had seen so many images, so that it can be rewound."""

import json
from pathlib import Path

from taming_dist.atomic import write_bytes
from taming_dist.formats.strict_json import json_lines

FILE = "wandb-steps.jsonl"


class Steps:
    """run.dir/wandb-steps.jsonl: for each row that W&B has got, the images seen and its step
    there."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / FILE

    def note(self, images: int, step: int) -> None:
        """A row was logged."""
        line = json.dumps({"samples": images, "step": step}, allow_nan=False)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(f"{line}\n")

    def before(self, images: int) -> int | None:
        """The step of the last row that comes before all that have seen more images; None where
        there is none, or no row has seen more: then there is nothing to rewind."""
        kept, is_all = self._until(images)
        return None if is_all or not kept else kept[-1][1]

    def cut(self, images: int) -> None:
        """The run was rewound: forget the rows after those that `before` looks at."""
        kept, _ = self._until(images)
        write_bytes(self.path, b"".join(line + b"\n" for line, _ in kept))

    def _until(self, images: int) -> tuple[list[tuple[bytes, int]], bool]:
        """The lines before the first one that has seen more images, each with its step, and
        whether these are all."""
        kept: list[tuple[bytes, int]] = []
        if self.path.is_file():
            for line, row in json_lines(self.path):
                if row is None or not isinstance(row.get("step"), int):
                    continue  # torn by a crash
                if row["samples"] > images:
                    return kept, False
                kept.append((line, row["step"]))
        return kept, True
