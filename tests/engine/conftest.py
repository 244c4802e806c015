"""Real ranks for tests: a worker script as one process alone and as a pair, all at once."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID")
RunWorker = Callable[[Path], dict[str, Any]]


def start(worker: Path, out: Path, **variables: str) -> subprocess.Popen:
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
    environment |= {"OMP_NUM_THREADS": "1"} | variables
    return subprocess.Popen(
        [sys.executable, str(worker), str(out)],
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@pytest.fixture(scope="session")
def run_worker(tmp_path_factory: pytest.TempPathFactory) -> RunWorker:
    """Run `python worker.py OUT` alone and on two ranks; what each wrote to OUT-<rank>.json, as
    one-0, two-0 and two-1."""

    def run(worker: Path) -> dict[str, Any]:
        folder = tmp_path_factory.mktemp(worker.stem)
        master = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
        processes = [start(worker, folder / "one")]
        for rank in ("0", "1"):
            processes.append(start(worker, folder / "two", RANK=rank, LOCAL_RANK=rank, **master))
        for process in processes:
            output, _ = process.communicate(timeout=280)
            assert process.returncode == 0, output[-4000:]
        names = ("one-0", "two-0", "two-1")
        return {name: json.loads((folder / f"{name}.json").read_text()) for name in names}

    return run
