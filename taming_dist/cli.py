"""How every command ends: one clear line and exit code 2 for the user's mistakes."""

import argparse
import io
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from taming_dist.announce import announce, announced
from taming_dist.errors import Diverged, LostRank, UserError
from taming_dist.ranges import LARGEST_SEED, Kind, Range

EXIT_USER_ERROR = 2
EXIT_ERROR = 1  # as for uncaught exceptions in Python
EXIT_AGAIN = 75  # BSD's EX_TEMPFAIL: the same command may well succeed


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are `UserError`s."""

    def error(self, message: str) -> NoReturn:
        """Raise `UserError`; argparse would print ten lines of usage first."""
        raise UserError(f"{message}; see --help for all arguments")


def number(kind: type, **limits: float) -> Callable[[str], Any]:
    """The `type` of an int or float argument; the limits are those of `Range`."""
    allowed = Range(**limits)  # type: ignore[arg-type]

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = text
        advice = allowed.advice(value, Kind(kind, is_list=False, optional=False))
        if advice:
            raise argparse.ArgumentTypeError(f"{text!r} is invalid: {advice}")
        return value

    return parse


COUNT = number(int, at_least=1)
SEED = number(int, at_least=0, at_most=LARGEST_SEED)


def count(number: int, noun: str) -> str:
    """ "1 shard" or "2 shards"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def duration(seconds: float) -> str:
    """As a person says it: 8.3 s, 45 s, 4 min 05 s, 2 h 07 min."""
    if round(seconds) < 60:
        return f"{seconds:.{0 if seconds >= 10 else 1}f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    return f"{minutes // 60} h {minutes % 60:02d} min"


def file_prefix(text: str) -> str:
    """The `type` of an argument that starts file names: it cannot lead into another folder."""
    if not re.fullmatch(r"[\w-]+", text, re.ASCII):
        raise argparse.ArgumentTypeError(f"{text!r} is invalid: use letters, digits, _ and - only")
    return text


def fail(message: str) -> NoReturn:
    """Print `error: message` as one line, once for all ranks that fail alike, and exit with 2."""
    announce(message)
    sys.exit(EXIT_USER_ERROR)


def run(main: Callable[[], None]) -> None:
    """Run the main function of a tool; a user's mistake becomes one line and exit code 2."""
    with one_line():
        main()


@contextmanager
def one_line(log: Path | None = None) -> Iterator[None]:
    """End the process with one line instead of a traceback for errors that have such a line.

    Other errors propagate; with `log`, a file that has their traceback, they too end in one line,
    which names that file.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names may contain any bytes
    try:
        yield
    except UserError as error:
        fail(str(error))
    except Diverged as error:
        announce(str(error))
        sys.exit(EXIT_ERROR)
    except LostRank as error:
        if not announced():  # the cause was reported first; this would only repeat it
            announce(str(error))
        sys.exit(EXIT_ERROR)
    except Exception as error:
        if isinstance(error, PermissionError) and error.filename is not None:
            fail(f"no permission for {error.filename}: use another folder or fix its permissions")
        if log is None:
            raise
        announce(f"{type(error).__name__}: {error}", f" (traceback in {log})")
        sys.exit(EXIT_ERROR)
