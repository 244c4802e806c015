"""Runs on a GPU (marked `gpu`) and, so that they cannot rot, the same on the CPU (marked `slow`).

Commands run in processes of their own, which see the GPU or do not; this process needs none.
"""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
WORKER = Path(__file__).with_name("worker.py")
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID")
MOST_S = 480  # of all cells together
Line = dict[str, Any]


def environment(device: str, **more: str) -> dict[str, str]:
    """The variables of a process that is to run on a device."""
    kept = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
    kept |= {"PYTHONPATH": f"{ROOT}:{ROOT}/tests/engine", "NETRC": "/dev/null"}
    if device == "cpu":
        kept |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return kept | more


@pytest.fixture(
    scope="module",
    params=[
        pytest.param("cuda", marks=pytest.mark.gpu),
        pytest.param("cpu", marks=pytest.mark.slow),
    ],
)
def device(request: pytest.FixtureRequest) -> str:
    """Where what is tested runs; what it is compared with runs on the CPU."""
    kind: str = request.param
    return kind


def start(command: Sequence[str], device: str, folder: Path, **more: str) -> subprocess.Popen[str]:
    """Start Python with a command in a folder, on a device."""
    return subprocess.Popen(
        [sys.executable, *command],
        cwd=folder,
        env=environment(device, **more),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def finish(process: subprocess.Popen[str], seconds: float) -> str:
    """What the process has printed; it ends well, and within so many seconds."""
    try:
        output, _ = process.communicate(timeout=seconds)
    except BaseException:
        process.kill()
        print(process.communicate()[0][-6000:])
        raise
    assert process.returncode == 0, output[-6000:]
    return output


@pytest.fixture(scope="session")
def run_cells(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., dict[str, Line]]:
    """Run cells of worker.py on a device, on so many ranks; the lines of the first rank by cell.

    Where the process ends before its last cell is there, a new one runs those that are left.
    """

    def run(device: str, cells: Sequence[str], ranks: int = 1) -> dict[str, Line]:
        folder, left = tmp_path_factory.mktemp("cells"), list(cells)
        found: dict[str, Line] = {}
        while left:
            tails = launch(device, left, folder, ranks)
            done = folder / "out-0.jsonl"
            lines = done.read_text().splitlines() if done.is_file() else []
            found |= {line["cell"]: line for line in map(json.loads, lines)}
            left = [cell for cell in left if cell not in found]
            if left:
                found[left[0]] = {"error": f"the process ended:\n{tails}"}
            left = left[1:]
        return {name: line | {"folder": folder} for name, line in found.items()}

    return run


def launch(device: str, cells: Sequence[str], folder: Path, ranks: int) -> str:
    """Run the worker's ranks to their end; the ends of what they have printed."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    processes = []
    for rank in map(str, range(ranks)):
        place = {} if ranks == 1 else {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": str(ranks)}
        place |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port} if place else {}
        processes.append(start([str(WORKER), "out", *cells], device, folder, **place))
    tails = []
    for process in processes:
        try:
            output, _ = process.communicate(timeout=MOST_S)
        except BaseException:
            for other in processes:
                other.kill()
            raise
        tails.append(output[-4000:])
    return "\n".join(tails)
