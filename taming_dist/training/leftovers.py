"""What a run that died while writing has left in its folder: unfinished files of its own kinds.

They are removed when it starts again, before anything else needs the room: after a full disk they
may be most of what fills it.
"""

from pathlib import Path

from taming_dist.engine.finding import remove_unfinished
from taming_dist.training.export import remove_unfinished_exports

FILES = (
    "config.yaml.tmp",
    "metrics.jsonl.tmp",
    "wandb-id.tmp",
    "wandb-steps.jsonl.tmp",
    "images/images-*.png.tmp",
)


def remove_leftovers(run_dir: Path) -> None:
    """Delete what was being written when the run of this folder died; nothing else of anyone's."""
    remove_unfinished(run_dir / "checkpoints")
    remove_unfinished_exports(run_dir)
    for pattern in FILES:
        for path in run_dir.glob(pattern):
            path.unlink()
