"""What has the host wait for the device, and what it copies there, noticed while a step runs."""

import sys
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

# What an operation gives depends on the values: the host has to know them.
WAITING = {
    "_local_scalar_dense",  # float(), bool(), int(), item()
    "nonzero",
    "masked_select",
    "_unique2",
    "equal",
    "is_nonzero",
}
CALLS = ("torch.cuda.synchronize", "torch.cuda.Stream.synchronize", "torch.cuda.Event.synchronize")
# Files whose code reads values on the host: torch's optimizers the counts of steps, where there is
# no GPU, and the condition its batch, before it is copied.
HOSTS = ("/torch/optim/", "/prior/conditions.py")


class Waited(AssertionError):
    """The host would have waited for the device."""


@contextmanager
def no_waiting(device: torch.device) -> Iterator[None]:
    """Within, the host may not wait for the device.

    A GPU tells itself what waits, but for the explicit calls. On the CPU nothing does; what would
    on a GPU is told by the operations that run.
    """
    with ExitStack() as stack:
        if device.type != "cuda":
            stack.enter_context(ValuesOnTheHost())
            yield
            return
        for name in CALLS:
            stack.enter_context(mock.patch(name, side_effect=Waited(name)))
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")


class ValuesOnTheHost(TorchDispatchMode):
    """Raises where an operation would have the host wait if the tensors were on a GPU."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.overloadpacket.__name__
        if (name in WAITING or _indexes_by_mask(name, args)) and not _may_read():
            raise Waited("".join(["\n", *traceback.format_stack(limit=12), name]))
        return func(*args, **(kwargs or {}))


def _indexes_by_mask(name: str, args: tuple[Any, ...]) -> bool:
    """x[mask]: how much that gives depends on the mask."""
    if not name.startswith(("index", "_index")) or len(args) < 2 or not isinstance(args[1], list):
        return False
    return any(isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in args[1])


def _may_read() -> bool:
    """Whether the operation is one of HOSTS'."""
    frame = sys._getframe(2)
    while frame is not None:
        if any(part in frame.f_code.co_filename for part in HOSTS):
            return True
        frame = frame.f_back
    return False


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
