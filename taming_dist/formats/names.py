"""Names from outside, of files, tar members and classes: as valid UTF-8 text, and in order.

A name on disk is bytes. Python holds those that are not UTF-8 as lone surrogates, which no file in
UTF-8 can hold and no terminal shows. So names become text here, once, where they come in.
"""

import re

# What a name may not hold as it is: half a character, control characters, which would break lines,
# and a backslash that would read as the begin of an escape.
UNFIT = re.compile(r"[\ud800-\udfff]|[\x00-\x1f\x7f]|\\(?=x[0-9a-f]{2})")
SURROGATE = re.compile(r"[\ud800-\udfff]")
DIGITS_OR_SIGN = re.compile(r"[0-9]+|.", re.DOTALL)


def escape(name: str) -> str:
    """A name, decoded with `surrogateescape`, as UTF-8 text of one line.

    Bytes that are not UTF-8 and control characters become `\\xNN`, and so does a backslash before
    `xNN`; all else stays. Other names give other texts, and replacing each `\\xNN` by its byte
    gives the name back (docs/data-formats.md).
    """
    if name.isascii() and name.isprintable() and "\\" not in name:
        return name
    return UNFIT.sub(_as_bytes, name)


def printable(text: str) -> str:
    """The text with what is not UTF-8 as `\\xNN`; what is stays as it is, so twice is as once."""
    return SURROGATE.sub(_as_bytes, text)


def natural_order(name: str) -> tuple[list[tuple[str, int, str]], str]:
    """A key to sort names by, numbers in them by their value: a2 before a10, A before a."""
    parts = DIGITS_OR_SIGN.findall(name)
    return [_rank(part) for part in parts], name


def _rank(part: str) -> tuple[str, int, str]:
    """A number stands where its first digit would, and a longer one is larger."""
    if "0" <= part[0] <= "9":
        digits = part.lstrip("0")
        return "0", len(digits), digits
    return part, 0, ""


def _as_bytes(found: re.Match[str]) -> str:
    sign = found[0]
    is_byte = "\udc80" <= sign <= "\udcff"
    data = sign.encode("utf-8", "surrogateescape" if is_byte else "surrogatepass")
    return "".join(f"\\x{byte:02x}" for byte in data)
