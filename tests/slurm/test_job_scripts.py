"""What the job scripts make of an allocation: real sbatch and srun, with a stand-in for python."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.conftest import repository_of

REPOSITORY = Path(__file__).resolve().parents[2]
NAMES = (
    "SLURM_PROCID",
    "SLURM_NTASKS",
    "SLURM_LOCALID",
    "MASTER_ADDR",
    "MASTER_PORT",
    "OMP_NUM_THREADS",
    "SLURM_CPUS_PER_TASK",
    "CUDA_VISIBLE_DEVICES",
    "MALLOC_TRIM_THRESHOLD_",
)
# Writes down what a rank is told; `-c` is the scripts' own check.
STAND_IN = f"""#!{sys.executable}
import json, os, socket, sys
if sys.argv[1] != "-c":
    told = {{name: os.environ.get(name) for name in {NAMES!r}}}
    told |= {{"argv": sys.argv[1:], "host": socket.gethostname()}}
    with open(f"rank-{{told['SLURM_PROCID']}}.json", "w") as file:
        json.dump(told, file)
"""
# Every rank refuses, the first one last.
REFUSING = f"""#!{sys.executable}
import os, sys, time
if sys.argv[1] != "-c":
    if os.environ["SLURM_PROCID"] == "0":
        time.sleep(1)
        print("error: no such key")
    sys.exit(2)
"""
CPU = ("--gpus-per-node=0", "--ntasks-per-node=1", "--cpus-per-task=1")


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """The job scripts beside an environment whose python is the stand-in."""
    return repository_of(tmp_path / "repository with space", STAND_IN)


@pytest.fixture
def ranks(tmp_path: Path) -> Callable[[], list[dict[str, Any]]]:
    """What the ranks of a job that ran in tmp_path were told, in the order of ranks."""

    def read() -> list[dict[str, Any]]:
        told = [json.loads(path.read_text()) for path in tmp_path.glob("rank-*.json")]
        return sorted(told, key=lambda rank: int(rank["SLURM_PROCID"]))

    return read


def test_every_gpu_gets_a_rank_and_its_share_of_the_cpus(cluster, repository, ranks, tmp_path):
    options = ("--nodes=2", "--gpus-per-node=4", "--ntasks-per-node=2", "--cpus-per-task=6")
    job = cluster.submit(
        *options, REPOSITORY / "slurm/train_vqgan.sh", cwd=tmp_path, repository=repository
    )
    assert job.wait() == 0, job.text
    told = ranks()
    assert [rank["SLURM_PROCID"] for rank in told] == [str(n) for n in range(8)]
    assert [rank["host"] for rank in told] == ["node1"] * 4 + ["node2"] * 4
    assert [rank["SLURM_LOCALID"] for rank in told] == ["0", "1", "2", "3"] * 2
    assert {rank["SLURM_NTASKS"] for rank in told} == {"8"}
    assert {rank["CUDA_VISIBLE_DEVICES"] for rank in told} == {"0,1,2,3"}
    assert {rank["OMP_NUM_THREADS"] for rank in told} == {"3"}
    assert {rank["SLURM_CPUS_PER_TASK"] for rank in told} == {"3"}
    assert {rank["MASTER_ADDR"] for rank in told} == {"node1"}
    assert {rank["MASTER_PORT"] for rank in told} == {str(10000 + int(job.number))}
    assert {rank["MALLOC_TRIM_THRESHOLD_"] for rank in told} == {None}


def test_without_gpus_every_task_is_a_rank(cluster, repository, ranks, tmp_path):
    options = ("--nodes=2", "--gpus-per-node=0", "--ntasks-per-node=2", "--cpus-per-task=5")
    job = cluster.submit(
        *options, REPOSITORY / "slurm/train_transformer.sh", cwd=tmp_path, repository=repository
    )
    assert job.wait() == 0, job.text
    told = ranks()
    assert [rank["host"] for rank in told] == ["node1", "node1", "node2", "node2"]
    assert {rank["OMP_NUM_THREADS"] for rank in told} == {"5"}
    assert {rank["SLURM_CPUS_PER_TASK"] for rank in told} == {"5"}
    assert {rank["MALLOC_TRIM_THRESHOLD_"] for rank in told} == {"4294967296"}
    assert told[0]["argv"] == ["-m", "taming_dist.train", "+experiment=flickr_transformer"]


def test_overrides_arrive_as_they_were_typed(cluster, repository, ranks, tmp_path):
    (tmp_path / "train-000000.tar").touch()  # what an unquoted pattern would turn into
    overrides = [
        "+experiment=demo",
        "run.name=two words",
        "optim.betas=[0.5, 0.9]",
        "data.train=train-*.tar",
        "data.val={a..b}'\"$HOME",
    ]
    job = cluster.submit(
        "--nodes=2", *CPU, "slurm/train_vqgan.sh", *overrides, cwd=repository, repository=None
    )
    assert job.wait() == 0, job.text
    told = [json.loads(path.read_text()) for path in sorted(repository.glob("rank-*.json"))]
    assert [rank["argv"] for rank in told] == [["-m", "taming_dist.train", *overrides]] * 2


def test_tasks_see_the_environment_where_sbatch_exports_little(
    cluster, repository, ranks, tmp_path
):
    script = REPOSITORY / "slurm/tokenize.sh"
    job = cluster.submit(
        "--nodes=1",
        *CPU,
        "--export=TAMING_DIST",
        script,
        "--model",
        "my export",
        "--batch",
        "8",
        cwd=tmp_path,
        repository=repository,
    )
    assert job.wait() == 0, job.text
    tool = str(repository / "tools/tokenize_dataset.py")
    assert [rank["argv"] for rank in ranks()] == [[tool, "--model", "my export", "--batch", "8"]]
    assert ranks()[0]["MASTER_ADDR"] == "node1"


def test_when_all_ranks_fail_the_first_one_is_heard_and_the_status_is_theirs(
    cluster, repository, tmp_path
):
    (repository / ".venv/bin/python").write_text(REFUSING)
    script = REPOSITORY / "slurm/train_vqgan.sh"
    job = cluster.submit("--nodes=2", *CPU, script, cwd=tmp_path, repository=repository)
    assert job.wait() == 2, job.text
    assert job.facts()["JobState"] == "FAILED"
    assert "error: no such key" in job.text.splitlines()


def test_every_rank_of_a_sampling_job_runs_the_command(cluster, repository, ranks, tmp_path):
    script = REPOSITORY / "slurm/sample.sh"
    given = ["transformer=my export", "vqgan=vqgan", "out=out", "n=8"]
    job = cluster.submit("--nodes=2", *CPU, script, *given, cwd=tmp_path, repository=repository)
    assert job.wait() == 0, job.text
    assert [rank["argv"] for rank in ranks()] == [["-m", "taming_dist.sample", *given]] * 2
    assert [rank["SLURM_PROCID"] for rank in ranks()] == ["0", "1"]


def test_an_evaluation_has_a_rank_for_each_gpu(cluster, repository, ranks, tmp_path):
    given = ["model=my export", "data=val", "out=out"]
    options = ("--gpus-per-node=4", "--ntasks-per-node=4")
    script = REPOSITORY / "slurm/evaluate.sh"
    job = cluster.submit(*options, script, *given, cwd=tmp_path, repository=repository)
    assert job.wait() == 0, job.text
    assert [rank["argv"] for rank in ranks()] == [["-m", "taming_dist.evaluate", *given]] * 4
    assert [rank["SLURM_PROCID"] for rank in ranks()] == ["0", "1", "2", "3"]


SCRIPTS = ["train_vqgan.sh", "train_transformer.sh", "tokenize.sh", "sample.sh", "evaluate.sh"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_job_that_cannot_find_the_repository_says_so_in_one_line(cluster, tmp_path, name):
    job = cluster.submit(*CPU, REPOSITORY / "slurm" / name, cwd=tmp_path, repository=None)
    assert job.wait() == 2
    mend = "submit from the repository, or set TAMING_DIST to it"
    assert job.text.splitlines() == [f"error: {tmp_path} is not taming_dist: {mend}"]


def test_a_job_without_the_package_says_what_to_run(cluster, repository, tmp_path):
    (repository / ".venv/bin/python").write_text("#!/bin/sh\nexit 1\n")
    job = cluster.submit(
        *CPU, REPOSITORY / "slurm/train_vqgan.sh", cwd=tmp_path, repository=repository
    )
    assert job.wait() == 2
    assert job.text.startswith("error: no python with taming_dist: run 'make env' in ")
    assert len(job.text.splitlines()) == 1
