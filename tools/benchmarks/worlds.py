"""Worlds of ranks on this machine, on gloo: forks of this process, which has loaded DeepSpeed."""

import multiprocessing
import os
import socket
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from typing import Any

Work = Callable[[Barrier], Any]


def prepare() -> None:
    """Load DeepSpeed once, for all ranks, which take the CPU with a thread each."""
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    from taming_dist.engine.start import load_deepspeed

    load_deepspeed()


def launch(work: Work, ranks: int, worlds: int = 1) -> list[Any]:
    """What `work` gives on every rank of so many new worlds, which run at the same time and have
    nothing to do with each other; its barrier is one for the ranks of all."""
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(ranks * worlds)
    ends = []
    for _ in range(worlds):
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": str(ranks)}
        for rank in range(ranks):
            ours, theirs = context.Pipe(duplex=False)
            place = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            arguments = (work, theirs, barrier, place)
            context.Process(target=take_part, args=arguments, daemon=True).start()
            theirs.close()  # so that a rank that dies ends the wait for it
            ends.append(ours)
    return [end.recv() for end in ends]


def take_part(work: Work, end: Connection, barrier: Barrier, place: dict[str, str]) -> None:
    """One rank."""
    os.environ |= place
    end.send(work(barrier))


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])
