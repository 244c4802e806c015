"""Real ranks for tests: a worker script alone, as a pair and as four, all at once."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID")
WORLDS = {"one": 1, "two": 2, "four": 4}
RunWorker = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def run_worker(tmp_path_factory: pytest.TempPathFactory) -> RunWorker:
    """Run `worker.py OUT ARGUMENTS` in worlds of so many ranks, by default alone and as a pair;
    what each rank wrote to OUT-<rank>.json, as one-0, two-0, two-1 ... OUT lies in `folder`."""

    def run(
        worker: Path,
        *arguments: str,
        worlds: tuple[str, ...] = ("one", "two"),
        folder: Path | None = None,
    ) -> dict[str, Any]:
        folder = folder or tmp_path_factory.mktemp(worker.stem)
        launch([str(worker), str(folder), *arguments, *(f"{w}={WORLDS[w]}" for w in worlds)])
        names = [f"{world}-{rank}" for world in worlds for rank in range(WORLDS[world])]
        return {name: json.loads((folder / f"{name}.json").read_text()) for name in names}

    return run


def launch(arguments: list[str]) -> None:
    """Run tests/engine/ranks.py; whatever happens, none of its processes is left."""
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("ranks.py")), *arguments],
        env=environment | {"OMP_NUM_THREADS": "1"},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=560)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert process.returncode == 0, output[-4000:]
