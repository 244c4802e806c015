"""What has the host wait for the device, and what it copies there, noticed while a step runs."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from runpy import run_path
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Scripts import this, too, for which `tests` may be a package of others.
Waiting = run_path(str(Path(__file__).parents[1] / "engine/waiting.py"))["Waiting"]
CALLS = ("torch.cuda.synchronize", "torch.cuda.Stream.synchronize", "torch.cuda.Event.synchronize")


@contextmanager
def no_waiting(device: torch.device) -> Iterator[None]:
    """Within, the host may not wait for the device.

    A GPU tells itself what waits, but for the explicit calls. On the CPU nothing does; what would
    on a GPU is told by the operations that run.
    """
    if device.type != "cuda":
        with Waiting() as waiting:
            yield
        assert waiting.found == []
        return
    with ExitStack() as stack:
        for name in CALLS:
            stack.enter_context(mock.patch(name, side_effect=AssertionError(name)))
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


class Copies(TorchDispatchMode):
    """`found`: a line for each tensor copied from the CPU's memory to a GPU, saying how."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        given = kwargs or {}
        result = func(*args, **given)
        name = func.overloadpacket.__name__
        if name in ("_to_copy", "copy_"):
            source = args[1] if name == "copy_" else args[0]
            if source.is_cpu and result.is_cuda:
                going_on = given.get("non_blocking", name == "copy_" and len(args) > 2 and args[2])
                where = "pinned" if source.is_pinned() else "pageable"
                self.found.append(f"{where}, {'not waited for' if going_on else 'waited for'}")
        return result
