"""Processes that share work through a folder rather than a process group: their numbers."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from taming_dist.launch import place


@dataclass(frozen=True)
class Worker:
    """The number of this worker among `count`: only a hint at which part to begin with. `rank`:
    its number among those that one launcher has started."""

    number: int
    count: int
    local_rank: int
    rank: int = 0

    @property
    def who(self) -> str:
        """The prefix of its lines."""
        return f"worker {self.number}: " if self.count > 1 else ""


def worker_of(environment: Mapping[str, str]) -> Worker:
    """The worker of this process: from torchrun, srun, a Slurm job array, or alone.

    In an array, every task may have several processes.
    """
    # There is no process group, so the address of the first process does not matter.
    here = place({"MASTER_ADDR": "", "MASTER_PORT": "0", **environment})
    names = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_COUNT")
    if not all(environment.get(name, "").isdigit() for name in names):
        return Worker(here.rank, here.world_size, here.local_rank, here.rank)
    task, first, tasks = (int(environment[name]) for name in names)
    # Array tasks may be numbered with gaps: workers with the same number merely begin alike.
    number = (task - first) % tasks * here.world_size + here.rank
    return Worker(number, tasks * here.world_size, here.local_rank, here.rank)


def environment_worker() -> Worker:
    """The worker of this process, from its own environment."""
    return worker_of(os.environ)
