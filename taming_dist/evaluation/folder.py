"""The folder that an evaluation writes."""

import tempfile
from pathlib import Path

from taming_dist.engine.world import World
from taming_dist.errors import UserError
from taming_dist.evaluation.nearest import PICTURE


def prepare_folder(out: Path, world: World) -> None:
    """Make `out` exist, writable, and free of an earlier evaluation's results; the first rank does.

    Raises:
        UserError: it cannot be written.
    """
    if not world.is_first:
        return
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
        (out / "metrics.json").unlink(missing_ok=True)  # its presence means that all is complete
        for name in ("reconstructions.png", PICTURE):
            (out / name).unlink(missing_ok=True)
        for name in ("input", "reconstruction"):
            for picture in (out / "images").glob(f"[0-9]*-{name}.png"):
                picture.unlink()
    except OSError as error:
        raise UserError(f"out: cannot write to {out} ({error.strerror}), choose another") from error
