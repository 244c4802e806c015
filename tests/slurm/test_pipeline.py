"""The chain of jobs: a real Slurm with its dependencies, and a stand-in for python."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.conftest import repository_of

REPOSITORY = Path(__file__).resolve().parents[2]
# Writes down its arguments; fails in the job, or the task of an array, that fail.txt names.
STAND_IN = f"""#!{sys.executable}
import json, os, pathlib, sys
if sys.argv[1] == "-c":
    sys.exit()
name = os.environ["SLURM_JOB_NAME"]
task = name + "-" + os.environ.get("SLURM_ARRAY_TASK_ID", "0")
with open(f"argv-{{task}}.json", "w") as file:
    json.dump(sys.argv[1:], file)
fail = pathlib.Path("fail.txt")
sys.exit(2 if fail.exists() and fail.read_text() in (name, task) else 0)
"""
CHAIN = """
images='my images'
out=made
stage1=(+experiment=flickr 'optim.betas=[0.5, 0.9]')
stage2=(+experiment=flickr_segmentation_transformer)
views=flip
workers=2
sample=(n=4)
options=(--gpus-per-node=0 --ntasks-per-node=1 --cpus-per-task=1)
training_options=(--nodes=2)
"""
CONDITION = "condition=(+experiment=flickr_segmentation)\n"
AFTER_TOKENIZATION = {"stage2", "sample", "evaluate_stage2"}


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """The job scripts beside an environment whose python is the stand-in."""
    return repository_of(tmp_path / "repository with space", STAND_IN)


def submit(cluster: Any, repository: Path, folder: Path, chain: str) -> tuple[dict[str, Any], str]:
    """Submit a chain in a folder; gives its jobs by name, and what the script printed."""
    (folder / "chain.sh").write_text(chain)
    said = cluster.run(repository / "slurm/pipeline.sh", "chain.sh", cwd=folder)
    words = [line.split() for line in said.splitlines()]
    jobs = {line[0]: cluster.job(line[2].strip(","), folder) for line in words if line[1] == "job"}
    return jobs, said


def told(folder: Path, name: str, task: int = 0) -> list[str]:
    return json.loads((folder / f"argv-{name}-{task}.json").read_text())


def span(job: Any) -> tuple[str, str]:
    facts = job.facts()
    return facts["StartTime"], facts["EndTime"]


@pytest.mark.slow
def test_a_chain_runs_in_order_and_each_job_gets_what_those_before_it_made(
    cluster, repository, tmp_path
):
    jobs, said = submit(cluster, repository, tmp_path, CHAIN + CONDITION)
    assert list(jobs) == [
        "stage1",
        "condition",
        "evaluate_stage1",
        "tokenize_train",
        "tokenize_val",
        "stage2",
        "sample",
        "evaluate_stage2",
    ]
    for job in jobs.values():
        assert job.wait() == 0, job.facts()
    spans = {name: span(job) for name, job in jobs.items()}
    assert max(spans["stage1"][1], spans["condition"][1]) <= spans["tokenize_train"][0]
    assert max(spans["tokenize_train"][1], spans["tokenize_val"][1]) <= spans["stage2"][0]
    assert spans["stage2"][1] <= min(spans["sample"][0], spans["evaluate_stage2"][0])
    assert "slurm-NAME-JOB.out says why" in said

    images = ["data.train=my images/train", "data.val=my images/val"]
    train = ["-m", "taming_dist.train"]
    overrides = ["+experiment=flickr", "optim.betas=[0.5, 0.9]"]
    train += ["log.group=made"]
    assert told(tmp_path, "stage1") == [*train, *overrides, *images, "run.dir=made/stage1"]
    overrides = ["+experiment=flickr_segmentation"]
    assert told(tmp_path, "condition") == [*train, *overrides, *images, "run.dir=made/condition"]
    for task in range(2):
        assert told(tmp_path, "tokenize_train", task)[1:] == [
            *("--model", "made/stage1/export"),
            *("--condition-model", "made/condition/export"),
            *("--shards", "my images/train", "--out", "made/codes/train", "--views", "flip"),
        ]
    assert told(tmp_path, "stage2") == [
        *train,
        "+experiment=flickr_segmentation_transformer",
        "data.train=made/codes/train",
        "data.val=made/codes/val",
        "data.vqgan=made/stage1/export",
        "data.condition_vqgan=made/condition/export",
        "run.dir=made/stage2",
    ]
    assert told(tmp_path, "sample")[2:] == [
        "transformer=made/stage2/export",
        "vqgan=made/stage1/export",
        "out=made/samples",
        "condition=made/codes/val",
        "log.group=made",
        "n=4",
    ]
    assert told(tmp_path, "evaluate_stage2")[2:] == [
        "model=made/stage2/export",
        "data=made/codes/val",
        "out=made/evaluation/stage2",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("failing", ["tokenize_val", "tokenize_train-1"])
def test_where_a_job_fails_those_that_need_it_are_cancelled_and_no_other(
    cluster, repository, tmp_path, failing
):
    (tmp_path / "fail.txt").write_text(failing)
    jobs, _ = submit(cluster, repository, tmp_path, CHAIN)
    assert "condition" not in jobs
    array = jobs.pop("tokenize_train").number
    for task in (0, 1):
        jobs[f"tokenize_train-{task}"] = cluster.job(f"{array}_{task}", tmp_path)
    for job in jobs.values():
        job.wait()
    states = {name: job.facts()["JobState"] for name, job in jobs.items()}
    assert states.pop(failing) == "FAILED"
    assert {name for name, state in states.items() if state == "CANCELLED"} == AFTER_TOKENIZATION
    assert {state for name, state in states.items() if name not in AFTER_TOKENIZATION} == {
        "COMPLETED"
    }


def test_a_chain_of_which_a_job_is_refused_leaves_none_behind(cluster, repository, tmp_path):
    (tmp_path / "chain.sh").write_text(CHAIN + "training_options=(--hold)\nworkers=-3\n")
    found = [line.split()[0] for line in cluster.run("squeue", "-h", cwd=tmp_path).splitlines()]
    with pytest.raises(AssertionError, match="error: sbatch has refused tokenize_train"):
        cluster.run(repository / "slurm/pipeline.sh", "chain.sh", cwd=tmp_path)
    left = [line.split()[0] for line in cluster.run("squeue", "-h", cwd=tmp_path).splitlines()]
    assert set(left) <= set(found)


@pytest.mark.parametrize(
    ("chain", "said"),
    [
        (None, "error: give the file of a chain, such as slurm/chain_flickr.sh\n"),
        ("out=made", "error: chain.sh: set images=\n"),
    ],
)
def test_a_chain_that_is_not_given_is_refused_in_one_line(tmp_path, chain, said):
    if chain is not None:
        (tmp_path / "chain.sh").write_text(chain)
    script = REPOSITORY / "slurm/pipeline.sh"
    done = subprocess.run([script, "chain.sh"], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", said)


SBATCH = """#!/bin/bash
for word; do printf '%s\\n' "$word"; done >"$RECORDED/$(ls "$RECORDED" | wc -l)"
echo 1
"""


def test_a_chain_that_asks_for_wandb_has_all_of_it_told_as_one_group(tmp_path: Path) -> None:
    """A stand-in for sbatch writes down its arguments."""
    asked, recorded = tmp_path / "sbatch", tmp_path / "recorded"
    asked.write_text(SBATCH)
    asked.chmod(0o755)
    recorded.mkdir()
    (tmp_path / "chain.sh").write_text(f"{CHAIN}wandb=offline\ngroup='my group'\n")
    path = f"{tmp_path}:{os.environ['PATH']}"
    subprocess.run(
        [REPOSITORY / "slurm/pipeline.sh", "chain.sh"],
        cwd=tmp_path,
        env=os.environ | {"PATH": path, "RECORDED": str(recorded)},
        check=True,
    )
    words = [file.read_text().splitlines() for file in sorted(recorded.iterdir())]
    told = {each[1].removeprefix("--job-name="): each for each in words}
    for name in ("stage1", "stage2", "sample"):
        assert {"log.group=my group", "log.wandb=offline"} <= set(told[name])
    for name in ("tokenize_train", "tokenize_val"):
        at = told[name].index("--wandb")
        assert told[name][at : at + 4] == ["--wandb", "offline", "--wandb-group", "my group"]
    assert not [word for word in told["evaluate_stage1"] if word.startswith(("--wandb", "log."))]
