"""One training job through all that happens on shared nodes: preempted, a rank killed, warned of
the time limit, a node crashed. Each time it starts again, and it ends as if nothing had happened.

A stand-in for python shows the rest in less time: what is not started again (cancelled, refused, no
progress) in test_requeue.py, arrays there and in test_pipeline.py, chains in test_pipeline.py.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.test_jobs import ONE_CPU_EACH, SMALL_MODEL, SMALL_RUN, lines, write_images

REPOSITORY = Path(__file__).resolve().parents[2]
SETTINGS = (
    *("--config-dir", "../conf", "+experiment=trial", "run.dir=two words"),
    *("data.train=../train", "data.val=../val"),
    *SMALL_MODEL,
    *[setting for setting in SMALL_RUN if not setting.startswith("train.steps=")],
    # the discriminator sees the whole batch at once, and its weight is the same, on any ranks
    *("data.micro_batch=4", "loss.adaptive=lagged"),
    "train.checkpoint_every=50",
)
EXPERIMENT = "# @package _global_\nrun: {{name: trial}}\ntrain: {{steps: {steps}}}\n"

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]


@dataclass
class Trial:
    """A job and its run."""

    job: Any
    run: Path

    def starts(self) -> list[int]:
        """The steps at which the run was started."""
        events = lines(self.run / "events.jsonl")
        return [line["step"] for line in events if line["event"] in ("start", "resume")]

    def steps(self) -> int:
        """The steps that it has logged."""
        return ([0] + [line["step"] for line in lines(self.run / "metrics.jsonl")])[-1]

    def trains(self, after: int) -> None:
        """Wait until the run has started again after so many starts, and made steps since."""
        self.job.until(lambda: len(self.starts()) > after, seconds=300)
        self.job.until(lambda: self.steps() > self.starts()[-1] + 2)

    def ended(self, restarts: int) -> None:
        """Wait until Slurm has put the job back into the queue after so many restarts."""
        self.job.until(lambda: int(self.job.facts()["Restarts"]) > restarts, seconds=300)


def submit(cluster: Any, folder: Path, name: str, *options: str) -> Trial:
    """Train in a folder of this name, with the steps of `write_steps`."""
    cwd = folder / name
    cwd.mkdir(exist_ok=True)
    script = REPOSITORY / "slurm/train_vqgan.sh"
    job = cluster.submit(*ONE_CPU_EACH, *options, script, *SETTINGS, cwd=cwd)
    return Trial(job, cwd / "two words")


def write_steps(folder: Path, steps: int) -> None:
    """How many steps a run makes in all; each start reads it."""
    file = folder / "conf/experiment/trial.yaml"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(EXPERIMENT.format(steps=steps))


def preempt(cluster: Any, folder: Path, trial: Trial) -> None:
    (folder / "urgent").mkdir()
    options = ("--partition=urgent", "--exclusive", "--nodes=2", "--wrap=true")
    assert cluster.submit(*options, cwd=folder / "urgent").wait() == 0


def kill_a_rank(cluster: Any, folder: Path, trial: Trial) -> None:
    beside = ("srun", f"--jobid={trial.job.number}", "--overlap", "--nodes=1", "--ntasks=1")
    pattern = "^python -m taming_dist.train"  # the oldest: the others are processes of the rank
    kill = ("pkill", "--signal=KILL", "--full", "--oldest", pattern)
    cluster.run(*beside, "--nodelist=node2", *kill, cwd=folder)


def warn_of_the_time_limit(cluster: Any, folder: Path, trial: Trial) -> None:
    """Slurm warns three minutes before the limit, so at once, and has other limits later."""
    restarts = int(trial.job.facts()["Restarts"])
    limit = ("scontrol", "update", f"JobId={trial.job.number}")
    cluster.run(*limit, "TimeLimit=3", cwd=folder)
    trial.ended(restarts)
    cluster.run(*limit, "TimeLimit=60", cwd=folder)


def crash_a_node(cluster: Any, folder: Path, trial: Trial) -> None:
    """The job waits for the node; by then nobody can miss the steps that it is to end with."""
    restarts = int(trial.job.facts()["Restarts"])
    cluster.crash(2)
    trial.ended(restarts)
    write_steps(folder, trial.steps() + 5)
    cluster.boot(2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("trial")
    write_images(path)
    return path


@pytest.fixture(scope="module")
def runs(cluster: Any, folder: Path) -> Iterator[tuple[Trial, Trial]]:
    """A run after all of it, and one of as many steps to which nothing has happened."""
    write_steps(folder, 10**6)
    disturbed = submit(cluster, folder, "disturbed", "--partition=shared")
    try:
        starts = 0
        for disturb in (preempt, kill_a_rank, warn_of_the_time_limit, crash_a_node):
            disturbed.trains(after=starts)
            starts = len(disturbed.starts())
            disturb(cluster, folder, disturbed)
        undisturbed = submit(cluster, folder, "undisturbed")
        for trial in (disturbed, undisturbed):
            assert trial.job.wait(600) == 0, trial.job.text
        yield disturbed, undisturbed
    finally:
        disturbed.job.cancel()


@pytest.fixture
def comparing(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(REPOSITORY / "tools"))
    from trials import comparing

    return comparing


def test_a_job_starts_itself_again_after_each_fault_and_finishes(runs):
    job = runs[0].job
    assert job.facts()["JobState"] == "COMPLETED"
    said = [line for line in job.text.splitlines() if line.startswith("requeued ")]
    assert said[0].startswith("requeued (stopped by SIGTERM)")
    assert said[1].startswith("requeued (ended with status ")
    assert said[2].startswith("requeued (stopped by SIGUSR1)")
    assert not list(job.folder.glob("slurm-*"))


def test_its_metrics_and_weights_are_those_of_an_undisturbed_run(runs, comparing):
    assert comparing.differing_bits(*[trial.run for trial in runs]) == []


def test_it_continues_on_one_node_instead_of_two(cluster, folder, runs, comparing):
    steps = runs[0].steps() + 3
    write_steps(folder, steps)
    alone = submit(cluster, folder, "disturbed", "--nodes=1")
    pair = submit(cluster, folder, "undisturbed")
    for trial in (alone, pair):
        assert trial.job.wait(600) == 0, trial.job.text
        assert trial.steps() == steps
    assert "batch     4 images = 1 rank x 4 x 1 micro-batch" in alone.job.text
    assert "resumed on 1 rank, saved on 2: the samples of each step are the same" in alone.job.text
    rounding = comparing.Distance(losses=1e-5, weights=1e-4)
    assert comparing.distance(alone.run, pair.run).above(rounding) == []
