"""How a run has ended, for the script that started it: exit status 0 does not say whether it is
finished or was asked to stop.

If the environment variable TAMING_DIST_END names a file, the first rank writes one line of JSON to
it: {"finished": false, "step": 120, "images": 480, "reason": "stopped by SIGUSR1"}. It does so at
each checkpoint as well ("saved images-..."), which stays where the run is killed later; no file
means that it was killed before, or has never begun.
"""

import json
import logging
import os
from pathlib import Path

from taming_dist.atomic import write_bytes
from taming_dist.errors import UserError

VARIABLE = "TAMING_DIST_END"

logger = logging.getLogger(__name__)


def forget_outcome() -> None:
    """Remove what an earlier start wrote; UserError if this one could not write there."""
    if file := _file():
        if not os.access(file.absolute().parent, os.W_OK):
            raise UserError(f"{VARIABLE}={file}: no file can be made there; name another or none")
        file.unlink(missing_ok=True)


def write_outcome(step: int, images: int, finished: bool, reason: str) -> None:
    """Write why a run ends and how far it came, atomically. A disk that is full by now must not
    change how."""
    if file := _file():
        found = {
            "finished": finished,
            "step": step,
            "images": images,
            "reason": " ".join(reason.split()),
        }
        try:
            write_bytes(file, json.dumps(found, allow_nan=False).encode() + b"\n")
        except OSError as error:
            logger.warning("%s=%s cannot be written: %s", VARIABLE, file, error.strerror)


def _file() -> Path | None:
    name = os.environ.get(VARIABLE)
    return Path(name) if name else None
