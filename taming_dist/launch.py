"""The place of this process among the ranks of a run, known before torch is imported.

It comes from the launcher's environment: torchrun's variables, Slurm's (one srun task per GPU or
CPU rank), or none for a single process.
"""

import dataclasses
import os
import signal
from collections.abc import Mapping

from taming_dist.errors import UserError
from taming_dist.processes import end_with_parent

# What asks a run to save and stop: Ctrl-C, Slurm's end and its warning, and the end of a terminal.
# They reach a whole group of processes; the run alone answers, and its helpers have them blocked.
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


@dataclasses.dataclass(frozen=True)
class Place:
    """The place of this process in the run, and the address of rank 0."""

    rank: int
    world_size: int
    local_rank: int
    master_addr: str = "127.0.0.1"
    master_port: int = 0


ALONE = Place(rank=0, world_size=1, local_rank=0)


def end_with_launcher() -> None:
    """Have this rank be asked to stop (SIGTERM) when torchrun or srun ends without having ended it:
    a launcher that is killed would leave its ranks training on. A process that was started by a
    shell outlives it, as it always does."""
    if by_torchrun() or by_srun():
        end_with_parent(signal.SIGTERM)


def by_torchrun() -> bool:
    """Whether torchrun has started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def by_srun(environment: Mapping[str, str] = os.environ) -> bool:
    """Whether srun has started this process, or what has started it."""
    return "SLURM_PROCID" in environment and "SLURM_STEP_ID" in environment


def place(environment: Mapping[str, str]) -> Place:
    """Read the place from a launcher's environment; torchrun's variables win over Slurm's.

    Raises:
        UserError: only some of the variables are set.
    """
    if "RANK" in environment or "WORLD_SIZE" in environment:
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        rank, size, local = (_number(environment, name, "torchrun sets it") for name in names)
    elif by_srun(environment):
        names = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")
        rank, size, local = (_number(environment, name, "srun sets it") for name in names)
    else:
        return ALONE
    # torchrun keeps a store even for a single rank, at its own address.
    if size == 1 and not ("RANK" in environment and "MASTER_ADDR" in environment):
        return dataclasses.replace(ALONE, local_rank=local)
    port = _number(environment, "MASTER_PORT", "slurm/*.sh and torchrun set it")
    if "MASTER_ADDR" not in environment:
        raise UserError(
            "MASTER_ADDR is not set: start through torchrun or slurm/*.sh, which set it"
        )
    return Place(rank, size, local, environment["MASTER_ADDR"], port)


def _number(environment: Mapping[str, str], name: str, who: str) -> int:
    value = environment.get(name, "")
    if not value.isdigit():
        raise UserError(f"{name}={value!r} is not a number: {who}; start through the launcher")
    return int(value)


def environment_place() -> Place:
    """The place of this process from its own environment."""
    return place(os.environ)
