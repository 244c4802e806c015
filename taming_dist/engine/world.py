"""Who takes part in a run: rank, world size, device, and the few collectives that are used.

The launcher says who we are through the environment: torchrun's variables, or Slurm's (one srun
task per GPU or CPU rank), or nothing at all for a single process.
"""

import dataclasses
import os
import socket
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from taming_dist.engine.tf32 import use_tf32
from taming_dist.errors import UserError
from taming_dist.memory import keep_freed_memory


@dataclasses.dataclass(frozen=True)
class Place:
    """The place of this process in the run, and where rank 0 listens."""

    rank: int
    world_size: int
    local_rank: int
    master_addr: str
    master_port: int


def place(environment: Mapping[str, str]) -> Place:
    """Read the place from a launcher's environment; torchrun's variables win over Slurm's.

    Errors: UserError when only a part of the variables is there.
    """
    if "RANK" in environment or "WORLD_SIZE" in environment:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        rank, size, local = (_number(environment, name, "torchrun sets it") for name in names)
    elif "SLURM_PROCID" in environment and "SLURM_STEP_ID" in environment:
        names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
        rank, size, local = (_number(environment, name, "srun sets it") for name in names)
    else:
        return Place(0, 1, 0, "127.0.0.1", 0)
    # torchrun keeps the store of even a single rank, at an address of its own.
    if size == 1 and not ("RANK" in environment and "MASTER_ADDR" in environment):
        return Place(0, 1, local, "127.0.0.1", 0)
    port = _number(environment, "MASTER_PORT", "slurm/*.sh and torchrun set it")
    if "MASTER_ADDR" not in environment:
        raise UserError(
            "MASTER_ADDR is not set: start through torchrun or slurm/*.sh, which set it"
        )
    return Place(rank, size, local, environment["MASTER_ADDR"], port)


def _number(environment: Mapping[str, str], name: str, who: str) -> int:
    value = environment.get(name, "")
    if not value.isdigit():
        raise UserError(f"{name}={value!r} is no number: {who}; start through the launcher")
    return int(value)


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

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over ranks, in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def mean(self, tensor: Tensor) -> Tensor:
        """Mean over ranks, in place."""
        return self.sum(tensor).div_(self.world_size)

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on some rank."""
        if self.world_size == 1:
            return flag
        return bool(self.sum(torch.tensor(float(flag), device=self.device)) > 0)

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


def choose_device(local_rank: int = 0, tf32: bool = False) -> torch.device:
    """The GPU of this rank, or the CPU, with fp32 exact on it or as TF32 (`engine.tf32`). Under
    srun a rank may be shown its own GPU only."""
    use_tf32(tf32)
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


DEFAULT_TIMEOUT = timedelta(minutes=30)


def environment_place() -> Place:
    """The place of this process by its own environment."""
    return place(os.environ)
