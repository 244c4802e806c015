"""What lies where a download should be: a pointer to it, or a page about it."""

import os

from taming_dist.errors import UserError

LFS = b"version https://git-lfs.github.com/spec/"
PAGES = (b"<!doctype html", b"<html", b"<head", b"<?xml")
LOOKED_AT = 1024


def refuse_placeholder(path: str | os.PathLike[str], what: str) -> None:
    """Raise `UserError` if a file, which should be `what`, is a Git LFS pointer or a web page."""
    with open(path, "rb") as file:
        start = file.read(LOOKED_AT)
    name = os.fspath(path)
    if start.startswith(LFS):
        raise UserError(
            f"{name} is a Git LFS pointer, not {what}: run git lfs pull where it was cloned, or "
            f"download the file itself"
        )
    if start.removeprefix(b"\xef\xbb\xbf").lstrip().lower().startswith(PAGES):
        raise UserError(
            f"{name} is a web page (HTML), not {what}: the download went to a page about the file; "
            f"fetch the file itself, logged in if need be"
        )
