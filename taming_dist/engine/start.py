"""DeepSpeed's start, the only import of it, with its traps closed, and the process group.

Each trap has a test: its CPU backend compiles an extension at start; its groups ignore the timeout.
"""

import logging
import os
import warnings
from datetime import timedelta
from functools import cache
from types import ModuleType

import torch
import torch.distributed as dist

from taming_dist.engine.tf32 import EXACT, TF32
from taming_dist.engine.world import DEFAULT_TIMEOUT, World, choose_device, rendezvous
from taming_dist.errors import UserError
from taming_dist.launch import Place


@cache
def load_deepspeed() -> ModuleType:
    """Import DeepSpeed, which takes seconds, when it is first needed, with its traps closed."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    # It calls collectives by the names that every torch of our range has; newer ones warn of them.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    # Only inference uses this extension; building it takes minutes on a small CPU machine, and a
    # build that is killed leaves a lock on which every later start would hang.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def init_world(
    here: Place,
    tf32: TF32 = EXACT,
    deterministic: bool = False,
    timeout: timedelta = DEFAULT_TIMEOUT,
) -> World:
    """Join the process group (nccl on GPUs, else gloo), also for a single process; `tf32` and
    `deterministic` as in `choose_device`.

    Raises:
        UserError: the ranks cannot meet.
    """
    os.environ.update(rendezvous(here))
    device = choose_device(here.local_rank, tf32, deterministic)
    deepspeed = load_deepspeed()
    from deepspeed.comm.torch import TorchBackend

    # DeepSpeed's groups ignore the timeout that init_distributed is given.
    TorchBackend.new_group = lambda self, ranks: dist.new_group(ranks, timeout=timeout)
    try:
        deepspeed.init_distributed(
            dist_backend="nccl" if device.type == "cuda" else "gloo",
            timeout=timeout,
            auto_mpi_discovery=False,
            verbose=False,
        )
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        raise UserError(
            f"the ranks cannot meet at MASTER_ADDR={here.master_addr}, MASTER_PORT="
            f"{here.master_port} ({str(error).splitlines()[0]}): is the port in use, or a node "
            f"unreachable? Set another MASTER_PORT"
        ) from error
    return World(here.rank, here.world_size, here.local_rank, device)


def shutdown() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()
