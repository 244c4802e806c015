"""Start the ranks of a worker script: `python ranks.py WORKER FOLDER ARGUMENTS one=1 two=2`.

The slow imports are done once, here; every rank is then a fork that runs WORKER with the variables
of torchrun, the folder's `<name>` and the arguments. Worlds run at the same time.
"""

import gc
import os
import runpy
import socket
import sys
from pathlib import Path

import torch

import taming_dist.stages.prior  # noqa: F401  imported for the ranks
import taming_dist.stages.vqgan  # noqa: F401
from taming_dist.engine.start import load_deepspeed


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start(worker: str, arguments: list[str], variables: dict[str, str]) -> int:
    """The process id of a new rank."""
    process = os.fork()
    if process:
        return process
    os.environ.update(variables)
    sys.argv = [worker, *arguments]
    sys.path.insert(0, str(Path(worker).parent))
    sys.path.append(str(Path(__file__).parents[1]))
    runpy.run_path(worker, run_name="__main__")
    sys.stdout.flush()
    os._exit(0)


def main() -> None:
    worker, folder, *arguments = [word for word in sys.argv[1:] if "=" not in word]
    load_deepspeed()
    torch.compile(lambda: None)  # compiles nothing, but imports what DeepSpeed decorates with
    gc.freeze()  # DeepSpeed collects garbage at every start: not in all that was imported
    ranks = []
    for word in sys.argv[1:]:
        name, found, size = word.partition("=")
        if not found:
            continue
        shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": size}
        for rank in range(int(size)):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            ranks.append(start(worker, [f"{folder}/{name}", *arguments], shared | place))
    failed = [rank for rank in ranks if os.waitpid(rank, 0)[1] != 0]
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
