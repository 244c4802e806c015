"""Ranks of a training run as children of this process, which stands for the launcher.

They are forked from it once it has imported torch and DeepSpeed, so that a start takes a second
rather than ten: what runs in them is the command itself, `taming_dist.train`. As under torchrun
they have its variables, and are asked to end when the launcher is gone.
"""

import gc
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Shape:
    """How a run is cut."""

    zero: int
    ranks: int

    def __str__(self) -> str:
        return f"ZeRO {self.zero}, {self.ranks} rank{'s' * (self.ranks > 1)}"


def _nothing(rank: int) -> None:
    pass


class Group:
    """The ranks of one start, from the moment it is made."""

    def __init__(
        self,
        run_dir: Path,
        shape: Shape,
        arguments: Sequence[str],
        number: int,
        before: Callable[[int], None] = _nothing,
    ) -> None:
        """`number`: that of the start; the ranks' output and samples are kept under it. `before`:
        what each rank, whose number it is given, does first."""
        self.run_dir, self.shape = run_dir, shape
        self._kept = run_dir.parent / f"{run_dir.name}-starts"
        self._kept.mkdir(parents=True, exist_ok=True)
        self._name = f"{number:04d}"
        self.outcome = self._kept / f"{self._name}.json"
        port = free_port()
        command = [*arguments, f"engine.zero={shape.zero}", f"run.dir={run_dir}"]
        command.append(f"data.micro_batch={micro_batch(arguments, shape.ranks)}")
        self._before = before
        self.pids = [self._fork(rank, command, port) for rank in range(shape.ranks)]
        self._left = dict(enumerate(self.pids))
        self.statuses: dict[int, int] = {}

    def _fork(self, rank: int, command: list[str], port: int) -> int:
        pid = os.fork()
        if pid:
            return pid
        status = 1
        try:
            self._train(rank, command, port)
            status = 0
        except SystemExit as ended:
            status = ended.code if isinstance(ended.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def _train(self, rank: int, command: list[str], port: int) -> None:
        """What a rank does."""
        from taming_dist import train

        output = os.open(self._kept / f"{self._name}-{rank}.out", os.O_CREAT | os.O_WRONLY, 0o666)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(self.shape.ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "TORCHELASTIC_RUN_ID": "chaos",
            "TAMING_DIST_END": str(self.outcome),
        }
        sys.argv = ["taming_dist.train", *command]
        record_samples(self._kept / f"{self._name}-{rank}.samples")
        self._before(rank)
        train.main()

    def poll(self) -> bool:
        """Whether all ranks have ended."""
        for rank, pid in list(self._left.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                self.statuses[rank] = os.waitstatus_to_exitcode(status)
                del self._left[rank]
        return not self._left

    def kill(self, rank: int | None, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a rank a signal, or all that are left (None)."""
        for pid in self._left.values() if rank is None else [self.pids[rank]]:
            with suppress(ProcessLookupError):
                os.kill(pid, number)

    def wait(self, seconds: float) -> bool:
        """Wait until all ranks have ended, at most so long; whether they have."""
        deadline = time.monotonic() + seconds
        while not self.poll() and time.monotonic() < deadline:
            time.sleep(0.01)
        return not self._left

    @property
    def output(self) -> str:
        """The last that each rank has printed."""
        return "\n".join(
            f"rank {rank}, status {self.statuses.get(rank)}:\n{path.read_text()[-1500:]}"
            for rank in range(self.shape.ranks)
            if (path := self._kept / f"{self._name}-{rank}.out").is_file()
        )


def free_port() -> int:
    """A port at which the ranks can meet."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def micro_batch(arguments: Sequence[str], ranks: int) -> int:
    """A rank's part of a global batch."""
    given = [text for text in arguments if text.startswith("data.global_batch=")]
    return max(1, int(given[-1].partition("=")[2]) // ranks)


def record_samples(file: Path) -> None:
    """Have this rank write down, after each step, the images seen and the keys of its samples."""
    from taming_dist.training import loop

    step: Callable[..., Any] = loop.train_step
    record = os.open(file, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o666)

    def recorded(run: Any, micro_batches: list[Any], *rest: Any) -> None:
        step(run, micro_batches, *rest)
        keys = [key for batch in micro_batches for key in run.data.train.keys(batch)]
        os.write(record, f"{run.clock.images} {' '.join(keys)}\n".encode())

    loop.train_step = recorded  # type: ignore[assignment]


@contextmanager
def imported() -> Iterator[None]:
    """Import all that training does, once for all ranks; they have a thread each. What is there by
    then is no garbage, for which DeepSpeed looks at every start."""
    import torch

    from taming_dist import train  # noqa: F401
    from taming_dist.engine.start import load_deepspeed
    from taming_dist.stages import prior, schemas, vqgan  # noqa: F401

    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    torch.set_num_threads(1)
    load_deepspeed()
    torch.compile(lambda: None)  # compiles nothing, but imports what DeepSpeed decorates with
    schemas()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
