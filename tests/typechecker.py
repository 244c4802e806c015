"""What checks the signatures of models and losses while tests run; see tests/conftest.py."""

from collections.abc import Callable
from typing import Any

from beartype import BeartypeConf, beartype

# An int will do for a float, as it does for mypy.
_check = beartype(conf=BeartypeConf(is_pep484_tower=True))


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function with its calls checked, but for the constructors that dataclasses generate: what
    users give a config class has checks of its own, whose errors tests look at."""
    if function.__name__ == "__init__" and generated(function):
        return function
    hints = function.__annotations__
    function.__annotations__ = {
        name: Any if _protocol(hints[name]) else hints[name] for name in hints
    }
    return _check(function)


def _protocol(hint: Any) -> bool:
    """Whether it is a protocol: mypy's business, an object does not say whether it follows one."""
    return getattr(hint, "_is_protocol", False)


def generated(function: Callable[..., Any]) -> bool:
    """Whether a function has no file."""
    return function.__code__.co_filename.startswith("<")
