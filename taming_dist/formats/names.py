"""Names of files, tar members and classes: as valid UTF-8 text, and sorted naturally.

A name on disk is bytes. Python represents bytes that are not UTF-8 as lone surrogates, which can
neither be written as UTF-8 nor shown. So names become text here, once, where they enter.
"""

import re

# What has to be escaped: lone surrogates, control characters, which would break lines, and a
# backslash that would read as the start of an escape.
UNFIT = re.compile(r"[\ud800-\udfff]|[\x00-\x1f\x7f]|\\(?=x[0-9a-f]{2})")
SURROGATE = re.compile(r"[\ud800-\udfff]")
DIGITS_OR_SIGN = re.compile(r"[0-9]+|.", re.DOTALL)


def escape(name: str) -> str:
    """A name, decoded with `surrogateescape`, as one line of UTF-8 text.

    Bytes that are not UTF-8 and control characters become `\\xNN`, and so does a backslash before
    `xNN`; everything else is kept. Different names give different texts, and replacing each `\\xNN`
    by its byte restores the name (docs/data-formats.md).
    """
    if name.isascii() and name.isprintable() and "\\" not in name:
        return name
    return UNFIT.sub(_as_bytes, name)


def printable(text: str) -> str:
    """The text with `\\xNN` for bytes that are not UTF-8; applying it twice changes nothing."""
    return SURROGATE.sub(_as_bytes, text)


def natural_order(name: str) -> tuple[list[tuple[str, int, str]], str]:
    """A sort key for names that orders numbers in them by value: a2 before a10, A before a."""
    parts = DIGITS_OR_SIGN.findall(name)
    return [_rank(part) for part in parts], name


def _rank(part: str) -> tuple[str, int, str]:
    """A number sorts where its first digit would, and a longer one is larger."""
    if "0" <= part[0] <= "9":
        digits = part.lstrip("0")
        return "0", len(digits), digits
    return part, 0, ""


def _as_bytes(found: re.Match[str]) -> str:
    sign = found[0]
    is_byte = "\udc80" <= sign <= "\udcff"
    data = sign.encode("utf-8", "surrogateescape" if is_byte else "surrogatepass")
    return "".join(f"\\x{byte:02x}" for byte in data)
