"""A two-node Slurm cluster of this machine's own, started once for all tests that ask for it."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
MINI_SLURM = Path(__file__).with_name("mini_slurm.sh")
PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged", "ip", "nsenter", "unshare", "pgrep", "mknod")
NODES, GPUS = 2, 4
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}


class Cluster:
    """Commands on its login node, which sees the same files; the cluster lives until `close`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log = folder / "cluster.log"
        with open(self.log, "wb") as log:
            self._process = subprocess.Popen(
                [MINI_SLURM, folder, str(NODES), str(GPUS)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
            )
        self._wait(lambda: (folder / "running").exists() or self._process.poll() is not None, 120)
        assert self._process.poll() is None, self.log.read_text()
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text()
        self._enter = [
            "nsenter",
            "--target",
            children.strip(),
            "--mount",
            "--uts",
            "--net",
            "--pid",
            "--",
            "bash",
            "-c",
            'cd "$0" && exec "$@"',
        ]

    def close(self) -> None:
        """End every process of the cluster."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def run(self, *command: str | Path, cwd: Path, **environment: str) -> str:
        """What a command prints on the login node, started in the folder `cwd`."""
        done = subprocess.run(
            [*self._enter, cwd, *command],
            env=self._environment() | environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, f"{command}: {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout.strip()

    def _environment(self) -> dict[str, str]:
        """Ours, with this Python first and nothing that is the script's to set."""
        ours = ("SLURM_", "SBATCH_", "TAMING_DIST", "RANK", "WORLD_SIZE", "MASTER_", "MALLOC_")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin"
        return kept | {"PATH": path, "SLURM_CONF": str(self.folder / "slurm.conf")}

    def submit(
        self,
        *command: str | Path,
        cwd: Path,
        repository: Path | None = REPOSITORY,
        **environment: str,
    ) -> "Job":
        """`sbatch` a command in `cwd`; TAMING_DIST names the repository, if one is given."""
        output = cwd / "job.out"
        output.unlink(missing_ok=True)
        if repository is not None:
            environment["TAMING_DIST"] = str(repository)
        number = self.run(
            "sbatch", "--parsable", f"--output={output}", *command, cwd=cwd, **environment
        )
        return Job(self, number, output)

    def job(self, number: str, cwd: Path) -> "Job":
        """A job that somebody else has submitted in `cwd`."""
        return Job(self, number, cwd / "job.out")

    def crash(self, node: int) -> None:
        """Power a node off: all that runs on it is gone at once."""
        self.run(MINI_SLURM, "crash", self.folder, str(node), cwd=self.folder)

    def boot(self, node: int) -> None:
        """Power a node on again."""
        self.run(MINI_SLURM, "boot", self.folder, str(node), cwd=self.folder)

    @staticmethod
    def _wait(condition: Callable[[], bool], seconds: float) -> None:
        end = time.monotonic() + seconds
        while not condition() and time.monotonic() < end:
            time.sleep(0.1)


class Job:
    """A submitted job, what Slurm says of it and what it printed."""

    def __init__(self, cluster: Cluster, number: str, output: Path) -> None:
        self._cluster, self.number, self._output = cluster, number, output
        self.folder = output.parent

    def facts(self) -> dict[str, str]:
        """The fields of `scontrol show job`: JobState, ExitCode, Reason, ...; of an array, those of
        the task that is furthest from its end."""
        shown = self._cluster.run(
            "scontrol", "--oneliner", "show", "job", self.number, cwd=self._cluster.folder
        )
        tasks = [
            dict(field.split("=", 1) for field in line.split() if "=" in field)
            for line in shown.splitlines()
        ]
        return min(tasks, key=lambda task: task["JobState"] in ENDED)

    def signal(self, name: str) -> None:
        """Send a signal to its tasks, as Slurm does before the time limit."""
        self.cancel(f"--signal={name}")

    def cancel(self, *options: str) -> None:
        """`scancel` it."""
        self._cluster.run("scancel", *options, self.number, cwd=self._cluster.folder)

    def until(self, condition: Callable[[], bool], seconds: float = 60) -> None:
        """Wait until something has happened; fail if the job ends or the time is over before."""
        end = time.monotonic() + seconds
        while not condition():
            state = self.facts()["JobState"]
            assert state not in ENDED, f"{state}\n{self.text}"
            assert time.monotonic() < end, f"after {seconds} s still {state}\n{self.text}"
            time.sleep(0.2)

    def wait(self, seconds: float = 300) -> int:
        """Wait for its end; gives its exit status."""
        end = time.monotonic() + seconds
        while (facts := self.facts())["JobState"] not in ENDED:
            if time.monotonic() > end:
                self.cancel()
                raise AssertionError(f"after {seconds} s still {facts['JobState']}\n{self.text}")
            time.sleep(0.2)
        return int(facts["ExitCode"].split(":")[0])

    @property
    def text(self) -> str:
        return self._output.read_text() if self._output.exists() else ""


def why_not() -> str | None:
    """Why no cluster can run here, or None."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    missing = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    if missing:
        return f"no Slurm here: {', '.join(missing)} not found (packages: see {MINI_SLURM.name})"
    tried = subprocess.run(
        ["unshare", "--mount", "--uts", "--net", "--pid", "--fork", "true"],
        capture_output=True,
        text=True,
    )
    if tried.returncode:
        return f"no Slurm here: {tried.stderr.strip()} (namespaces need root)"
    return None


def repository_of(folder: Path, python: str) -> Path:
    """The job scripts in a new `folder`, beside an environment whose python is this stand-in. The
    scripts are copies, so that they find the stand-in by where they lie."""
    programs = folder / ".venv" / "bin"
    programs.mkdir(parents=True)
    shutil.copytree(REPOSITORY / "slurm", folder / "slurm")
    (programs / "python").write_text(python)
    (programs / "python").chmod(0o755)
    (programs / "activate").write_text(f'PATH="{programs}:$PATH"\n')
    return folder


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """The running cluster; skips where there can be none, unless TAMING_REQUIRE_SLURM=1."""
    reason = why_not()
    if reason and os.environ.get("TAMING_REQUIRE_SLURM") == "1":
        pytest.fail(reason)
    if reason:
        pytest.skip(reason)
    # Not pytest's own folder: the path of a socket in it would be too long.
    with tempfile.TemporaryDirectory(prefix="slurm.") as name:
        started = Cluster(Path(name))
        try:
            yield started
        finally:
            started.close()
