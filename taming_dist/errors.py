"""The errors that end a command with one line rather than a traceback."""


class UserError(Exception):
    """A mistake the user can fix; the message is one line naming the key or file and the fix.

    Entry points print it as `error: ...` and exit with code 2 (see `taming_dist.cli`).
    """


class Diverged(Exception):
    """Too many consecutive steps were skipped for a loss or gradient that is not finite, or weights
    that are to be saved are not, or not the same on all ranks.

    Raised on all ranks alike; exit code 1.
    """


class LostRank(Exception):
    """Another rank ended while this one was waiting for it; exit code 1.

    The error to look for is the other rank's.
    """
