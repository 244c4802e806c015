"""Files found in place of a download: a pointer to it, a web page, or a compressed copy."""

import os

from taming_dist.errors import UserError

LFS = b"version https://git-lfs.github.com/spec/"
PAGES = (b"<!doctype html", b"<html", b"<head")
COMPRESSED = (b"\x1f\x8b\x08", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd")  # gzip, xz, Zstandard
LOOKED_AT = 1024
FIXES = {
    "a Git LFS pointer": "run git lfs pull in its clone, or download the file itself",
    "a web page (HTML)": "download the file itself rather than its page, logged in if necessary",
    "a compressed file": "unpack it first (gunzip, unxz, unzstd)",
}


def placeholder(start: bytes) -> str | None:
    """What a file with this start is instead of its contents, a key of FIXES; None if it may be
    genuine."""
    if start.startswith(LFS):
        return "a Git LFS pointer"
    if start.startswith(COMPRESSED):
        return "a compressed file"
    text = start[:LOOKED_AT].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    return "a web page (HTML)" if text.startswith(PAGES) else None


def refuse_placeholder(path: str | os.PathLike[str], what: str, name: str = "") -> None:
    """Raise `UserError` if a file that should be `what` is a placeholder. `name` is its real name
    if `path` is a copy."""
    with open(path, "rb") as file:
        found = placeholder(file.read(LOOKED_AT))
    if found is not None:
        raise UserError(f"{name or os.fspath(path)} is {found}, not {what}: {FIXES[found]}")
