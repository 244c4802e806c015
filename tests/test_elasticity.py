"""torchrun's own elasticity: real agents and ranks that are killed, and the same resume."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from taming_dist.models.prior.transformer import Transformer
from tests.test_train_prior import write_codes

pytestmark = pytest.mark.slow
TORCHRUN = (sys.executable, "-m", "torch.distributed.run")
SETTINGS = [
    "+experiment=flickr_transformer",
    "+scale=laptop",
    "data.train=codes",
    "data.val=codes",
    "data.vqgan=",
    "data.global_batch=4",
    "data.micro_batch=2",
    "data.lanes=4",
    "data.block=2",
    "model.layers=1",
    "model.heads=2",
    "model.width=16",
    "model/condition=class",
    "optim.lr=1e-3",
    "train.log_every=1",
    "train.checkpoint_every=4",
    "train.validate_every=0",
    "train.preview_every=0",
    "log.wandb=disabled",
]
# A node that is lost is noticed after 3 s, and one that goes on alone waits 5 s for others.
NODES = "last_call_timeout=5,keep_alive_interval=1,keep_alive_max_attempt=3"
Line = dict[str, Any]


class Agents:
    """torchruns in one folder; none is left behind, nor a rank of theirs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._started: list[subprocess.Popen[bytes]] = []

    def start(self, name: str, steps: int, *options: str) -> subprocess.Popen[bytes]:
        settings = [*SETTINGS, f"run.name={name}", f"train.steps={steps}"]
        command = [*TORCHRUN, *options, "-m", "taming_dist.train", *settings]
        environment = {key: value for key, value in os.environ.items() if key != "RANK"}
        with open(self.folder / f"{name}.out", "ab") as out:
            agent = subprocess.Popen(
                command,
                cwd=self.folder,
                env=environment
                | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
                stdout=out,
                stderr=out,
            )
        self._started.append(agent)
        return agent

    def lines(self, name: str, file: str) -> list[Line]:
        path = self.folder / "outputs" / name / file
        whole = path.read_text().split("\n")[:-1] if path.is_file() else []
        return [json.loads(line) for line in whole]

    def wait(self, condition: Callable[[], bool], name: str) -> None:
        deadline = time.monotonic() + 200
        while not condition():
            assert time.monotonic() < deadline, self.said(name)
            time.sleep(0.05)

    def wait_for_step(self, name: str, step: int) -> None:
        self.wait(lambda: any(s >= step for s, _ in self.losses(name)), name)

    def finish(self, name: str, agent: subprocess.Popen[bytes]) -> None:
        assert agent.wait(timeout=200) == 0, self.said(name)

    def said(self, name: str) -> str:
        return (self.folder / f"{name}.out").read_text()[-3000:]

    def losses(self, name: str) -> list[tuple[int, float]]:
        lines = self.lines(name, "metrics.jsonl")
        return [(line["step"], line["train/loss"]) for line in lines if "train/loss" in line]

    def end(self) -> None:
        for agent in self._started:
            for pid in [*ranks_of(agent), agent.pid]:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            agent.wait()


@pytest.fixture
def agents(tmp_path: Path) -> Iterator[Agents]:
    write_codes(tmp_path / "codes")
    made = Agents(tmp_path)
    yield made
    made.end()


def ranks_of(agent: subprocess.Popen[bytes]) -> list[int]:
    """The processes of an agent's ranks, the first one first."""
    return [
        pid
        for pid in sorted(map(int, filter(str.isdigit, os.listdir("/proc"))))
        if parent_of(pid) == agent.pid and b"taming_dist.train" in command_of(pid)
    ]


def parent_of(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def command_of(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def test_torchrun_starts_ranks_again_of_which_one_was_killed_and_the_end_is_the_same_to_the_bit(
    agents: Agents,
) -> None:
    steps, two = 60, ("--standalone", "--nproc_per_node=2")
    agents.finish("whole", agents.start("whole", steps, *two))
    agent = agents.start("killed", steps, *two, "--max-restarts=3")
    for killed, step in enumerate((10, 25)):
        agents.wait_for_step("killed", step)
        os.kill(ranks_of(agent)[killed], signal.SIGKILL)  # rank 0, then rank 1
    agents.finish("killed", agent)
    begun = [
        line["event"]
        for line in agents.lines("killed", "events.jsonl")
        if line["event"] in ("start", "resume")
    ]
    assert begun == ["start", "resume", "resume"]
    assert agents.losses("killed") == agents.losses("whole")
    one, other = (
        Transformer.from_pretrained(agents.folder / "outputs" / name / "export")
        for name in ("killed", "whole")
    )
    assert one.fingerprint == other.fingerprint


@pytest.mark.parametrize("lost", ["the agent", "the node"])
def test_what_is_left_of_two_nodes_continues_alone(agents: Agents, lost: str) -> None:
    """An agent that is killed leaves its rank, which saves; a node that is lost leaves nothing."""
    options = ["--nnodes=1:2", "--nproc_per_node=1", "--max-restarts=3", "--rdzv_backend=c10d"]
    options += [f"--rdzv_endpoint=127.0.0.1:{free_port()}", "--rdzv_id=nodes"]
    first, second = (
        agents.start("nodes", 300, *options, f"--rdzv_conf={NODES},is_host={is_host}")
        for is_host in (1, 0)
    )
    agents.wait(lambda: (agents.folder / "outputs/nodes/logs/rank-1.log").is_file(), "nodes")
    agents.wait_for_step("nodes", 10)
    for pid in [second.pid, *(ranks_of(second) if lost == "the node" else [])]:
        os.kill(pid, signal.SIGKILL)
    agents.finish("nodes", first)
    assert [step for step, _ in agents.losses("nodes")] == list(range(1, 301))
    ends = [line for line in agents.lines("nodes", "events.jsonl") if line["event"] == "exit"]
    assert (ends[-1]["finished"], ends[-1]["reason"]) == (True, "finished")
    assert not ends[-2]["finished"]
    if lost == "the agent":
        assert ends[-2]["reason"].startswith("the launcher of rank ")
    else:
        assert ends[-2]["reason"].startswith("rank ")
