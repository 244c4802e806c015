"""Error lines on stderr: a message that several ranks share is printed once.

Without collectives or network: healthy ranks may be waiting in a collective, and ranks that fail
early are not connected yet. The ranks of a node coordinate through small files in its temporary
folder: `<launch>-<line>.<rank>` means that a rank has this line to print, `<launch>-<line>.said`
that some rank prints it.
"""

import hashlib
import os
import stat
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from taming_dist.errors import UserError
from taming_dist.launch import Place, place
from taming_dist.processes import birth_of

WAIT_S = 2.0  # for the other ranks to reach the same error
KEPT_S = 86_400.0  # files of older launches are removed
LAUNCH = (
    "MASTER_ADDR",
    "MASTER_PORT",
    "TORCHELASTIC_RUN_ID",
    "TORCHELASTIC_RESTART_COUNT",
    "SLURM_JOB_ID",
    "SLURM_STEP_ID",
    "SLURM_RESTART_COUNT",
    # where a controller counts its jobs from one again
    "SLURM_CLUSTER_NAME",
    "SLURM_SUBMIT_DIR",
    "SLURM_STEP_LAUNCHER_PORT",
)


def announce(message: str, detail: str = "") -> None:
    """Print `error: message detail` as one line unless another rank of this launch does.

    The rank's number is added unless all ranks have the same message. `detail` may differ.
    """
    text = " ".join(message.split())
    here = _place()
    speaker = "" if here.world_size == 1 else _speaker(text, here)
    if speaker is not None:
        with suppress(OSError):  # nobody is there to read it
            print(f"error: {speaker}{text}{detail}", file=sys.stderr, flush=True)


def announced() -> bool:
    """Whether a rank of this launch, on this node, has announced anything."""
    with suppress(OSError):  # no temporary folder
        return any(_folder().glob(f"{_launch()}-*.said"))
    return False


def _speaker(text: str, here: Place) -> str | None:
    """The prefix of this rank's line; None if another rank prints it."""
    own = f"rank {here.rank}: "
    try:
        everyone = _wait_for_others(text, here)
        if not _claim(_file(text, "said")):
            return None
    except OSError:  # no temporary folder: better printed twice than not at all
        return own
    return "" if everyone else own


def _wait_for_others(text: str, here: Place) -> bool:
    """Whether all ranks have this message; stops waiting once they do or one has printed it."""
    _make_folder()
    _remove_old()
    _file(text, str(here.rank)).touch(mode=0o600)
    deadline = time.monotonic() + WAIT_S
    while True:
        everyone = all(_file(text, str(rank)).exists() for rank in range(here.world_size))
        if everyone or _file(text, "said").exists() or time.monotonic() > deadline:
            return everyone
        time.sleep(0.05)


def _claim(path: Path) -> bool:
    """Create a file; False if another rank has created it."""
    try:
        os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    except FileExistsError:
        return False
    return True


def _place() -> Place:
    """The place of this process, or that of a single process if the launcher's variables are
    invalid; the address of the first rank does not matter."""
    try:
        return place({"MASTER_ADDR": "", "MASTER_PORT": "0", **os.environ})
    except UserError:
        return Place(0, 1, 0, "", 0)


def _launch() -> str:
    """An identifier shared by exactly the ranks that one launcher started on this node."""
    facts = [os.environ.get(name, "") for name in LAUNCH]
    if "SLURM_STEP_ID" not in os.environ or "TORCHELASTIC_RUN_ID" in os.environ:
        # Slurm's tasks each have their own parent; the step's number is enough.
        facts += [str(os.getppid()), birth_of(os.getppid())]
    return _digest("\n".join(facts))


def _folder() -> Path:
    return Path(tempfile.gettempdir()) / f"taming_dist-{os.getuid()}"


def _make_folder() -> None:
    """Make the folder; `OSError` if it exists but is not a folder of this user.

    Its name can be guessed: a link planted by somebody else could lead to other files of this user,
    and old ones would be removed.
    """
    _folder().mkdir(mode=0o700, exist_ok=True)
    found = os.lstat(_folder())
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
        raise PermissionError(f"{_folder()} does not belong to this user")


def _file(text: str, suffix: str) -> Path:
    return _folder() / f"{_launch()}-{_digest(text)}.{suffix}"


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode(errors="replace")).hexdigest()[:16]


def _remove_old() -> None:
    for path in _folder().iterdir():
        with suppress(FileNotFoundError):  # another rank is doing the same
            if time.time() - path.stat().st_mtime > KEPT_S:
                path.unlink()
