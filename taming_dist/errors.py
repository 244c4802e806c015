"""The one exception for mistakes of the user: wrong keys, missing files, sizes that do not fit."""


class UserError(Exception):
    """A mistake the user can mend; the message is one line naming the key or file and the mend.

    Entry points print it as `error: ...` and exit with code 2 (see `taming_dist.cli`).
    """
