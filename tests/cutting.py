"""A file layer that ends a process in the middle of what it writes."""

import builtins
import os
from collections.abc import Callable
from itertools import count
from typing import Any
from unittest import mock

import safetensors.torch

CALLS = ("mkdir", "rename", "replace", "unlink", "rmdir", "fsync")
Patch = Callable[[object, str, Any], object]  # as `setattr`


class Cut:
    """Calls `end` at the `last`-th call of the file system: of a write half is done. Of what is
    written to a file only the first counts: small parts reach the disk together.

    `names`: what all calls so far did, in order.
    """

    def __init__(self, last: int, patch: Patch, end: Callable[[], None]) -> None:
        self.last, self._end = last, end
        self.names: list[str] = []
        for name in CALLS:
            patch(os, name, self._counted(name, getattr(os, name)))
        patch(builtins, "open", self._opened(builtins.open))
        patch(safetensors.torch, "serialize_file", self._torn(safetensors.torch.serialize_file))

    @property
    def left(self) -> int:
        """Calls until the end."""
        return self.last - len(self.names)

    def _count(self, name: str) -> bool:
        """Whether this call is the one."""
        self.names.append(name)
        return self.left == 0

    def _counted(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*given: Any, **named: Any) -> Any:
            if self._count(name):
                self._end()
            return call(*given, **named)

        return counting

    def _opened(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def opening(path: Any, mode: str = "r", *given: Any, **named: Any) -> Any:
            file = call(path, mode, *given, **named)
            if not set(mode) & set("wa"):
                return file
            if self._count("open"):
                self._end()
            cut = mock.MagicMock(wraps=file)
            cut.__enter__.return_value = cut
            cut.__exit__.side_effect = lambda *_: file.close()
            written = count()
            cut.write.side_effect = lambda data: self._write(file, data, next(written) == 0)
            return cut

        return opening

    def _write(self, file: Any, data: Any, is_first: bool) -> None:
        if is_first and self._count("write"):
            file.write(data[: len(data) // 2])
            file.flush()
            self._end()
        file.write(data)

    def _torn(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """safetensors writes by itself."""

        def writing(tensors: Any, path: Any, *given: Any, **named: Any) -> None:
            call(tensors, path, *given, **named)
            if self._count("write"):
                os.truncate(path, os.path.getsize(path) // 2)
                self._end()

        return writing
