"""When a job has itself started again: real sbatch, srun and requeues, with a stand-in for python.

All jobs are submitted at once, since each waits for most of its time to be started again.
"""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.conftest import repository_of

REPOSITORY = Path(__file__).resolve().parents[2]
# Ends as plan.json says for each start; `until`: only at that signal.
STAND_IN = f"""#!{sys.executable}
import json, os, signal, sys, time
if sys.argv[1] == "-c":
    sys.exit()
start = int(os.environ.get("SLURM_RESTART_COUNT", 0))
task = os.environ.get("SLURM_ARRAY_TASK_ID", "0")
if os.environ["SLURM_PROCID"] == "0":
    with open(f"started-{{task}}.jsonl", "a") as file:
        file.write(json.dumps(sys.argv[1:]) + "\\n")
with open(f"plan-{{task}}.json") as file:
    plan = json.load(file)[start]
if plan.get("until"):
    asked = []
    signal.signal(getattr(signal, plan["until"]), lambda number, frame: asked.append(number))
    open(f"waiting-{{task}}-{{os.environ['SLURM_PROCID']}}", "w").close()
    while not asked:
        time.sleep(0.05)
if os.environ["SLURM_PROCID"] == "0" and "end" in plan:
    with open(os.environ["TAMING_DIST_END"], "w") as file:
        file.write(json.dumps(plan["end"]) + "\\n")
sys.exit(plan.get("status", 0))
"""
CPU = ("--gpus-per-node=0", "--ntasks-per-node=1", "--cpus-per-task=1")
OVERRIDES = ["run.name=two words", "optim.betas=[0.5, 0.9]", "data.train={a..b}'\"$HOME*"]
Plan = list[dict[str, Any]]


def stopped(images: int, by: str = "SIGUSR1", **more: Any) -> dict[str, Any]:
    end = {"finished": False, "step": images // 4, "images": images, "reason": f"stopped by {by}"}
    return {"end": end, **more}


def crashed(images: int) -> dict[str, Any]:
    return {**stopped(images), "status": 7}


FINISHED = {"end": {"finished": True, "step": 9, "images": 36, "reason": "finished"}}
PLANS: dict[str, Plan] = {
    "stopped": [stopped(4), stopped(8, by="SIGTERM"), FINISHED],
    "crashing": [{"status": 7}] * 9,
    "crashing_later": [crashed(4), crashed(4), crashed(4), crashed(8), FINISHED],
    "stuck": [stopped(4), *[crashed(4)] * 9],
    "refused": [{"status": 2}],
    "cancelled": [stopped(4, by="SIGTERM", until="SIGTERM")] * 9,
    "interrupted": [stopped(4, by="SIGINT", until="SIGINT")] * 9,
    "once": [stopped(4)] * 9,
    "dry": [{}],
}
NODES = {"stopped": 2, "cancelled": 2, "interrupted": 2}


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The job scripts beside an environment whose python is the stand-in."""
    return repository_of(tmp_path_factory.mktemp("requeue") / "repository", STAND_IN)


Submit = Callable[..., Any]


@pytest.fixture(scope="module")
def submit(cluster: Any, repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Submit:
    """Submit a job script whose stand-ins (by array task) follow these plans, in a new folder."""

    def submit(plans: Sequence[Plan], *options: str, script: str = "train_vqgan.sh") -> Any:
        folder = tmp_path_factory.mktemp("job")
        for task, plan in enumerate(plans):
            (folder / f"plan-{task}.json").write_text(json.dumps(plan))
        path = REPOSITORY / "slurm" / script
        return cluster.submit(*CPU, *options, path, *OVERRIDES, cwd=folder, repository=repository)

    return submit


@pytest.fixture(scope="module")
def jobs(submit: Submit) -> dict[str, Any]:
    """A job for each plan, and: one that waits for the first, an array, one that waits for that."""
    made = {}
    for name, plan in PLANS.items():
        options = [f"--nodes={NODES.get(name, 1)}"]
        options += ["--no-requeue"] if name == "once" else []
        made[name] = submit([plan], *options)
    after = f"--dependency=afterok:{made['stopped'].number}"
    made["after"] = submit([[FINISHED]], "--nodes=1", after, "--kill-on-invalid-dep=yes")
    plans = [[FINISHED], [stopped(4), FINISHED], [FINISHED]]
    made["array"] = submit(plans, "--nodes=1", "--array=0-2", script="tokenize.sh")
    for name, signal in (("cancelled", []), ("interrupted", ["--signal=INT"])):
        job = made[name]
        job.until(lambda folder=job.folder: len([*folder.glob("waiting-*")]) == 2)
        job.cancel(*signal)
    return made


def starts(job: Any, task: int = 0) -> int:
    return len((job.folder / f"started-{task}.jsonl").read_text().splitlines())


def left(job: Any) -> list[str]:
    return [path.name for path in job.folder.glob("slurm-*")]


pytestmark = pytest.mark.slow


def test_a_stopped_run_is_started_again_until_it_is_finished(jobs):
    job = jobs["stopped"]
    assert job.wait() == 0, job.text
    assert job.facts()["Restarts"] == "2"
    assert starts(job) == 3
    assert [line for line in job.text.splitlines() if line.startswith("requeued ")] == [
        "requeued (stopped by SIGUSR1): this job continues when Slurm starts it again",
        "requeued (stopped by SIGTERM): this job continues when Slurm starts it again",
    ]
    assert left(job) == []


def test_every_start_gets_the_command_as_it_was_typed(jobs):
    job = jobs["stopped"]
    job.wait()
    told = [json.loads(line) for line in (job.folder / "started-0.jsonl").read_text().splitlines()]
    assert told == [["-m", "taming_dist.train", "+experiment=flickr", *OVERRIDES]] * 3


def test_a_job_that_depends_on_a_requeued_one_waits_until_that_is_finished(jobs):
    assert jobs["after"].wait() == 0, jobs["after"].text
    assert jobs["stopped"].facts()["JobState"] == "COMPLETED"
    assert jobs["stopped"].facts()["EndTime"] <= jobs["after"].facts()["StartTime"]


def test_a_crash_is_tried_again_as_long_as_the_run_comes_further(jobs):
    job = jobs["crashing_later"]
    assert job.wait() == 0, job.text
    assert starts(job) == 5


@pytest.mark.parametrize(("name", "images"), [("crashing", 0), ("stuck", 4)])
def test_a_run_that_comes_no_further_is_given_up_and_says_so_in_a_line(jobs, name, images):
    job = jobs[name]
    assert job.wait() == 1, job.text
    assert starts(job) == 4
    (said,) = [line for line in job.text.splitlines() if line.startswith("error: ")]
    given_up = f"error: given up after 3 restarts without progress at {images} images"
    assert said == f"{given_up} (ended with status 7)"


def test_a_command_that_is_refused_is_not_started_again(jobs):
    assert jobs["refused"].wait() == 2
    assert starts(jobs["refused"]) == 1
    assert left(jobs["refused"]) == []


def test_a_job_that_its_user_cancels_is_not_started_again(jobs):
    job = jobs["cancelled"]
    job.wait()
    assert job.facts()["JobState"] == "CANCELLED"
    assert job.facts()["Restarts"] == "0"
    assert json.loads((job.folder / f"slurm-{job.number}.end").read_text())["images"] == 4
    assert "requeued" not in job.text


def test_a_job_that_its_user_interrupts_fails_so_that_none_follows(jobs):
    job = jobs["interrupted"]
    assert job.wait() == 130, job.text
    assert job.facts()["Restarts"] == "0"
    assert "not requeued (stopped by SIGINT): the same command resumes" in job.text.splitlines()


def test_where_a_job_may_not_be_requeued_it_fails_and_says_so(jobs):
    job = jobs["once"]
    assert job.wait() == 1, job.text
    assert "error: not requeued (sbatch --no-requeue?): the same command resumes" in job.text


def test_a_command_that_says_nothing_of_its_end_is_finished(jobs):
    assert jobs["dry"].wait() == 0
    assert starts(jobs["dry"]) == 1


def test_of_an_array_only_the_stopped_task_is_started_again(jobs):
    assert jobs["array"].wait() == 0, jobs["array"].text
    assert [starts(jobs["array"], task) for task in range(3)] == [1, 2, 1]
