"""Who takes part in a run: rank, world size, device, and the few collectives that are used."""

import dataclasses
import re
import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from taming_dist.caches import keep_compiled
from taming_dist.copies import fetch
from taming_dist.engine.determinism import use_deterministic
from taming_dist.engine.tf32 import EXACT, TF32, use_tf32
from taming_dist.launch import Place
from taming_dist.memory import keep_freed_memory


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@dataclasses.dataclass(frozen=True)
class World:
    """The ranks of a run. Every method that is no property is a collective: all ranks call it."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this rank writes the files and prints."""
        return self.rank == 0

    @property
    def overlaps(self) -> bool:
        """Whether what is sent between ranks can be sent while the device computes."""
        return self.device.type == "cuda" and self.world_size > 1

    @property
    def device_name(self) -> str:
        """What the device of this rank is, such as NVIDIA H100 80GB HBM3, or CPU."""
        cuda = self.device.type == "cuda"
        return torch.cuda.get_device_name(self.device) if cuda else self.device.type.upper()

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def mean(self, tensor: Tensor) -> Tensor:
        """Mean over ranks, in place."""
        return self.sum(tensor).div_(self.world_size)

    def join_samples(self, tensor: Tensor) -> Tensor:
        """Join per-sample rows [b, ...] of all ranks in the order of the global batch [b * R, ...].

        Rank r holds the global positions r, r + R, r + 2R, ...
        """
        if self.world_size == 1:
            return tensor
        parts = [torch.empty_like(tensor) for _ in range(self.world_size)]
        dist.all_gather(parts, tensor.contiguous())
        return torch.stack(parts, 1).flatten(0, 1)

    def broadcast(self, value: Any) -> Any:
        """The first rank's value (picklable), on all ranks."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """The values (picklable) of all ranks, in their order, on all ranks."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def average(self) -> "Average | None":
        """A differentiable mean over ranks for batch statistics; None when there is one rank."""
        return Average(self.world_size) if self.world_size > 1 else None


class Agreement:
    """Whether a flag is set on some rank: all of them learn it at their next call, so that none has
    to wait for the device or the others. A single rank knows at once."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._told: Callable[[], Tensor] | None = None

    def __call__(self, flag: bool) -> bool:
        """Tell this rank's flag; gives whether some rank's was set at the call before
        (collective)."""
        if self._world.world_size == 1:
            return flag
        before = self._told
        told = torch.full((), float(flag), device=self._world.device)
        self._told = fetch(self._world.sum(told))
        return before is not None and bool(before().numpy() > 0)


class Average:
    """Mean over ranks through which gradients flow: every rank's loss sees every rank's input."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks

    def __call__(self, tensor: Tensor) -> Tensor:
        return _MeanOverRanks.apply(tensor, self.ranks)


class _MeanOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, ranks: int) -> Tensor:
        ctx.ranks = ranks
        total = tensor.clone()
        dist.all_reduce(total)
        return total / ranks

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # the mean is its own adjoint; as a function of its own it can be differentiated again
        return _MeanOverRanks.apply(grad, ctx.ranks), None


def choose_device(
    local_rank: int = 0, tf32: TF32 = EXACT, deterministic: bool = False
) -> torch.device:
    """The GPU of this rank, or the CPU, with fp32 exact on it or as TF32 (`engine.tf32`), and with
    the same numbers every time or not (`engine.deterministic`). Under srun a rank may be shown its
    own GPU only."""
    keep_compiled()
    use_tf32(tf32)
    use_deterministic(deterministic)
    if not torch.cuda.is_available():
        keep_freed_memory()
        return torch.device("cpu")
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def rendezvous(here: Place) -> dict[str, str]:
    """The environment variables that torch.distributed reads."""
    port = here.master_port or _free_port()
    return {
        "RANK": str(here.rank),
        "WORLD_SIZE": str(here.world_size),
        "LOCAL_RANK": str(here.local_rank),
        "MASTER_ADDR": here.master_addr,
        "MASTER_PORT": str(port),
    }


# of NCCL and of the store; their other errors are those of a rank's own set-up
LOST = re.compile("remote process|aborted|connection|broken pipe|timed? ?out", re.IGNORECASE)
DEFAULT_TIMEOUT = timedelta(minutes=30)


def set_timeout(seconds: float) -> None:
    """Have the collectives of all groups fail after so long, those that begin from now on."""
    for group in list(distributed_c10d._world.pg_map):
        distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)


def is_lost_connection(error: BaseException) -> bool:
    """Whether a collective failed because another rank is gone, or has kept this one waiting.

    Gloo's errors have no class of their own; they name the line of its source.
    """
    text = str(error)
    if isinstance(error, dist.DistError):
        return LOST.search(text) is not None
    return isinstance(error, RuntimeError) and "/gloo/" in text
