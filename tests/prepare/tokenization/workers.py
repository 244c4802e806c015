"""Tokenizes with several workers at once, after killing others with SIGKILL at random moments.

python workers.py MODEL SHARDS OUT WORKERS KILLS

Workers are forked, so that their start takes no time in which nothing could be interrupted; two
work at a time while they are killed.
"""

import os
import random
import runpy
import signal
import sys
import time
from pathlib import Path

import torch

TOOL = Path(__file__).parents[3] / "tools" / "tokenize_dataset.py"


def main() -> None:
    model, shards, out, workers, kills = sys.argv[1:]
    torch.set_num_threads(1)
    work = runpy.run_path(str(TOOL))["main"]
    arguments = ["--model", model, "--shards", shards, "--out", out, "--size", "8"]
    arguments += [
        "--text",
        "txt.npy",
        "--batch",
        "4",
        "--shard-samples",
        "6",
        "--threads",
        "1",
        "--stale-after",
        "1",
    ]

    def fork(rank: int, count: int) -> int:
        child = os.fork()
        if child == 0:
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": "0"}
            work(arguments)
            os._exit(0)
        return child

    kill(int(kills), Path(out), fork)
    last = [fork(rank, int(workers)) for rank in range(int(workers))]
    assert all(os.waitpid(worker, 0)[1] == 0 for worker in last)


def kill(count: int, out: Path, fork) -> None:
    """Kill `count` workers while they are at work; print how many shards there were each time."""
    moments = random.Random(0)
    working, killed = [], 0
    while killed < count:
        working += [fork(len(working), 2) for _ in range(2 - len(working))]
        victim = working.pop(moments.randrange(2))
        wait_for_cpu_seconds(victim, moments.uniform(0.0, 0.5))
        os.kill(victim, signal.SIGKILL)
        killed += os.WIFSIGNALED(os.waitpid(victim, 0)[1])
        finished = sorted(out.glob("*.tar"))
        print(killed, len(finished))
        if (out / "manifest.json").exists():
            # Too fast: some of the work is to be done again, so that kills go on hitting it.
            for path in finished[::2]:
                path.unlink()
    for worker in working:
        os.kill(worker, signal.SIGKILL)
        os.waitpid(worker, 0)


def wait_for_cpu_seconds(child: int, seconds: float) -> None:
    """Wait until a process has worked for so long, or ended: a moment that no load puts off."""
    while True:
        fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
        worked = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        if worked >= seconds or fields[0] == "Z":
            return
        time.sleep(0.005)


if __name__ == "__main__":
    main()
