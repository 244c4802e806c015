"""How every command ends: one clear line and exit code 2 for the user's mistakes."""

import argparse
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from taming_dist.errors import UserError

EXIT_USER_ERROR = 2


class Parser(argparse.ArgumentParser):
    """A parser of arguments that takes a wrong one for what it is, a mistake of the user."""

    def error(self, message: str) -> NoReturn:
        """Raise `UserError`; argparse would print ten lines of usage first."""
        raise UserError(f"{message}; --help lists all arguments")


def fail(message: str) -> None:
    """Print `error: message` as one line (on the first rank only) and exit with code 2."""
    rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID") or "0"
    if rank == "0":
        print(f"error: {' '.join(message.split())}", file=sys.stderr, flush=True)
    sys.exit(EXIT_USER_ERROR)


def run(main: Callable[[], None]) -> None:
    """Run the main function of a tool; a user's mistake becomes one line and exit code 2."""
    try:
        main()
    except UserError as error:
        fail(str(error))
    except PermissionError as error:
        fail(f"no permission for {error.filename}: choose another folder or mend its permissions")
