"""A file layer that ends a process in the middle of what it writes."""

import builtins
import io
import os
import re
from collections import Counter
from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import safetensors.torch

RANDOM = re.compile(r"(?<=^\.export-).*|(?<=-)\d+(?=\.clock$)")  # parts of names
CALLS = ("mkdir", "rename", "replace", "unlink", "rmdir", "fsync")
Patch = Callable[[object, str, Any], object]  # as `setattr`


class Call(NamedTuple):
    """A call of the file system, told from all others of a process: the `time`-th of its `name` on
    that `file` (without its folder, * for random parts), whatever other threads do meanwhile."""

    name: str
    file: str
    time: int

    def __str__(self) -> str:
        return f"{self.name} {self.file}" + f" ({self.time})" * (self.time > 1)


class Cut:
    """Calls `end` when `is_last` says so of a call of the file system that concerns something below
    `folder`. Of a write half is done then, an opened file is empty, anything else is not done. Of
    what is written to an open file only the first counts: small parts reach the disk together.

    `calls`: all so far, in order.
    """

    def __init__(
        self, folder: Path, is_last: Callable[[Call], bool], patch: Patch, end: Callable[[], None]
    ) -> None:
        self.calls: list[Call] = []
        self._folder, self._is_last, self._end = f"{folder}{os.sep}", is_last, end
        self._times: Counter[tuple[str, str]] = Counter()
        for name in CALLS:
            patch(os, name, self._counted(name, getattr(os, name)))
        for module in (builtins, io):  # pathlib has the latter
            patch(module, "open", self._opened(module.open))
        patch(safetensors.torch, "serialize_file", self._torn(safetensors.torch.serialize_file))

    def _count(self, name: str, path: Any) -> bool:
        """Whether this call is the one."""
        if isinstance(path, int):  # a descriptor
            path = os.readlink(f"/proc/self/fd/{path}")
        path = os.path.abspath(path)
        if not f"{path}{os.sep}".startswith(self._folder):
            return False
        file = RANDOM.sub("*", os.path.basename(path))
        self._times[name, file] += 1
        self.calls.append(Call(name, file, self._times[name, file]))
        return self._is_last(self.calls[-1])

    def _counted(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*given: Any, **named: Any) -> Any:
            path = given[0]
            if named.get("dir_fd") is not None:
                path = os.path.join(os.readlink(f"/proc/self/fd/{named['dir_fd']}"), path)
            if self._count(name, path):
                self._end()
            return call(*given, **named)

        return counting

    def _opened(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def opening(path: Any, mode: str = "r", *given: Any, **named: Any) -> Any:
            file = call(path, mode, *given, **named)
            if not set(mode) & set("wax+"):
                return file
            if self._count("open", path):
                self._end()
            cut = mock.MagicMock(wraps=file)
            cut.__enter__.return_value = cut
            cut.__exit__.side_effect = lambda *_: file.close()
            written = count()
            cut.write.side_effect = lambda data: self._write(file, path, data, next(written) == 0)
            return cut

        return opening

    def _write(self, file: Any, path: Any, data: Any, is_first: bool) -> int:
        if is_first and self._count("write", path):
            file.write(data[: len(data) // 2])
            file.flush()
            self._end()
        return file.write(data)

    def _torn(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """safetensors writes by itself."""

        def writing(tensors: Any, path: Any, *given: Any, **named: Any) -> None:
            call(tensors, path, *given, **named)
            if self._count("write", path):
                os.truncate(path, os.path.getsize(path) // 2)
                self._end()

        return writing
