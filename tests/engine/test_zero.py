"""DeepSpeed's traps stay closed: its extension is not built, its groups obey the timeout."""

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta

import pytest

from taming_dist.engine.start import init_world
from taming_dist.errors import UserError
from taming_dist.launch import Place

FROZEN = """
import os, time
from datetime import timedelta
import torch
from taming_dist.launch import environment_place
from taming_dist.engine.start import init_world, load_deepspeed
from taming_dist.engine.world import Agreement
world = init_world(environment_place(), timeout=timedelta(seconds=4))
assert load_deepspeed().ops.__compatible_ops__["deepspeed_shm_comm"] is False
from deepspeed.comm import new_group
group = new_group([0, 1])
sum_ = torch.ones(3)
assert world.sum(sum_)[0] == 2, sum_
rows = torch.tensor([[world.rank, 0], [world.rank, 1]])
assert world.join_samples(rows).tolist() == [[0, 0], [1, 0], [0, 1], [1, 1]]
x = torch.tensor([1.0 + world.rank], requires_grad=True)
(world.average()(x) ** 2 * (1 + world.rank)).backward()
assert x.grad.item() == 2 * 1.5 * (1 + 2) / 2, x.grad  # half of the sum of both ranks' gradients
agreed = Agreement(world)
assert [agreed(world.rank == 1), agreed(False), agreed(False)] == [False, True, False]
assert world.broadcast("word" if world.is_first else None) == "word"
world.barrier()
print("agreed", flush=True)
if world.rank == 1:
    time.sleep(60)
start = time.monotonic()
try:
    torch.distributed.all_reduce(torch.ones(1), group=group)
except RuntimeError as error:
    print("waited", round(time.monotonic() - start, 1), flush=True)
    os._exit(0)
"""


@pytest.fixture
def pair() -> Iterator[list[subprocess.Popen]]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    shared = {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": "1",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", FROZEN],
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    yield processes
    for process in processes:
        process.kill()
        process.wait()


def test_ranks_agree_and_a_frozen_one_is_given_up_after_the_timeout(
    pair: list[subprocess.Popen],
) -> None:
    start = time.monotonic()
    output, _ = pair[0].communicate(timeout=100)
    assert pair[0].returncode == 0, output[-3000:]
    assert "agreed" in output
    waited = float(output.split("waited")[1].split()[0])
    assert 3 < waited < 10
    assert pair[1].poll() is None, "the other rank was to be frozen, not gone"
    assert time.monotonic() - start < 60


def test_a_port_that_is_in_use_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", os.environ.copy())
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"MASTER_PORT={port} .*Set another MASTER_PORT"):
            init_world(Place(0, 2, 0, "127.0.0.1", port), timeout=timedelta(seconds=20))
