"""Each job script, for real, on two nodes: train, stop and go on, tokenize, train on the codes."""

import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from taming_dist.models.prior.transformer import Transformer
from tests.data.shard_files import writing_shards

REPOSITORY = Path(__file__).resolve().parents[2]
ONE_CPU_EACH = ("--nodes=2", "--gpus-per-node=0", "--ntasks-per-node=1", "--cpus-per-task=1")
CLASSES = 3
SMALL_MODEL = (
    "model.resolution=16",
    "model.channels=32",
    "model.multipliers=[1, 2]",
    "model.blocks=1",
    "model.attention_resolutions=[]",
    "model.latent_channels=8",
    "model.quantizer.codes=16",
    "model.quantizer.dim=8",
    "loss.terms.perceptual.weights=random",
    "loss.disc_start=2",
    "loss.discriminator.channels=8",
    "loss.discriminator.layers=1",
    "data.size=16",
)
SMALL_TRANSFORMER = (
    "model.vocabulary=0",
    "model.grid=[]",
    "model.layers=1",
    "model.heads=2",
    "model.width=16",
    "data.vqgan=",
)
SMALL_RUN = (
    "train.steps=4",
    "train.log_every=1",
    "data.global_batch=4",
    "data.micro_batch=1",
    "data.lanes=4",
    "data.block=4",
    "log.wandb=disabled",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the jobs run: image shards of noise in train/ and val/."""
    path = tmp_path_factory.mktemp("jobs")
    write_images(path)
    return path


def write_images(folder: Path) -> None:
    """Write image shards of noise into train/ and val/, each image with a label map."""
    random = np.random.default_rng(0)
    for split, samples in (("train", 24), ("val", 4)):
        with writing_shards(folder / split, split, 10) as write:
            for number in range(samples):
                image = random.integers(0, 256, (20, 24, 3), dtype=np.uint8)
                labels = random.integers(0, CLASSES, (20, 24), dtype=np.uint8)
                files = {"png": png(image), "seg.png": png(labels)}
                write(f"{number:04d}", files)


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def train_vqgan(cluster: Any, folder: Path, *overrides: str) -> Any:
    return cluster.submit(
        *ONE_CPU_EACH,
        REPOSITORY / "slurm/train_vqgan.sh",
        "data.train=train",
        "data.val=val",
        "run.dir=two words",
        *SMALL_MODEL,
        *SMALL_RUN,
        *overrides,
        cwd=folder,
    )


@pytest.fixture(scope="module")
def trained(cluster: Any, folder: Path) -> tuple[Path, str]:
    """The run directory of a VQGAN trained by a job, and what the job printed."""
    job = train_vqgan(cluster, folder)
    assert job.wait() == 0, job.text
    return folder / "two words", job.text


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def trained_steps(run: Path) -> list[int]:
    """Those of the log points; validations have lines of their own."""
    return [line["step"] for line in lines(run / "metrics.jsonl") if "train/loss" in line]


def test_a_vqgan_trains_on_two_nodes(trained):
    run, printed = trained
    assert "batch     4 images = 2 ranks x 1 x 2 micro-batches" in printed
    assert "run       flickr in two words" in printed
    assert trained_steps(run) == [1, 2, 3, 4]
    assert sorted(path.name for path in (run / "logs").iterdir()) == ["rank-0.log", "rank-1.log"]
    assert (run / "export" / "model.safetensors").is_file()


def test_a_mistyped_override_ends_the_job_with_one_line(cluster, folder):
    job = train_vqgan(cluster, folder, "train.stepz=4")
    assert job.wait() == 2, job.text
    said = [line for line in job.text.splitlines() if not line.startswith(("srun:", "slurmstepd"))]
    assert len(said) == 1, job.text
    assert said[0].startswith("error: ")
    assert "stepz" in said[0]


def only_error_of_rank_1(job) -> str:
    """The one error line of a job that ends with status 2, told with the rank's number."""
    assert job.wait() == 2, job.text
    said = [line for line in job.text.splitlines() if line.startswith("error: ")]
    assert len(said) == 1, job.text
    assert said[0].startswith("error: rank 1: ")
    return said[0]


def test_an_error_of_one_rank_in_training_ends_the_job_with_its_line_and_status(cluster, folder):
    """Each node has the images on a disk of its own, and the disk of the second one is bad."""
    cluster.run("srun", "--nodes=2", "cp", "-r", folder / "train", "/mnt/train", cwd=folder)
    damage = "LC_ALL=C sed -i s/PNG/xxx/g /mnt/train/*.tar"
    cluster.run("srun", "--nodelist=node2", "bash", "-c", damage, cwd=folder)
    job = train_vqgan(cluster, folder, "run.dir=broken", "data.train=/mnt/train")
    assert "/mnt/train" in only_error_of_rank_1(job)
    assert "Traceback" not in job.text
    told = [(line["event"], line.get("rank")) for line in lines(folder / "broken/events.jsonl")]
    assert told == [("start", None), ("error", 1), ("exit", None)]


@pytest.mark.slow
def test_an_error_of_one_rank_at_the_start_ends_the_others_which_wait_for_it(cluster, folder):
    cluster.run("srun", "--nodelist=node1", "cp", "-r", folder / "train", "/mnt/first", cwd=folder)
    job = train_vqgan(cluster, folder, "run.dir=nowhere", "data.train=/mnt/first")
    assert "/mnt/first" in only_error_of_rank_1(job)
    assert not (folder / "nowhere").exists()


def test_a_signal_has_the_ranks_save_and_the_same_command_goes_on(cluster, folder, trained):
    run, _ = trained
    job = train_vqgan(cluster, folder, "train.steps=100000")
    job.until(lambda: lines(run / "metrics.jsonl")[-1]["step"] > 5)
    job.signal("INT")  # after any other the job would start itself again
    assert job.wait() == 130, job.text
    events = lines(run / "events.jsonl")
    assert [line["event"] for line in events] == [
        "start",
        "save",
        "exit",
        "resume",
        "save",
        "signal",
        "exit",
    ]
    assert events[3]["step"] == 4
    last = events[-1]["step"]
    assert 5 < last < 100000
    assert events[-1]["finished"] is False
    assert trained_steps(run) == list(range(1, last + 1))
    assert (run / "checkpoints" / f"images-{4 * last:012d}" / "meta.json").is_file()


@pytest.fixture(scope="module")
def codes(cluster: Any, folder: Path, trained: tuple[Path, str]) -> Path:
    """The code shards of the images, written by a job of two workers."""
    job = cluster.submit(
        *ONE_CPU_EACH,
        REPOSITORY / "slurm/tokenize.sh",
        *tokenize_options(folder, trained),
        "--out",
        "codes",
        cwd=folder,
    )
    assert job.wait() == 0, job.text
    assert "worker 0: " in job.text
    assert "worker 1: " in job.text
    return folder / "codes"


def tokenize_options(folder: Path, trained: tuple[Path, str]) -> list[str]:
    run, _ = trained
    return ["--model", f"{run}/export", "--shards", "train", "--shard-samples", "7"]


@pytest.mark.slow
def test_two_workers_write_the_bytes_of_one(folder, trained, codes):
    tool = [sys.executable, REPOSITORY / "tools/tokenize_dataset.py"]
    subprocess.run(
        [*tool, *tokenize_options(folder, trained), "--out", "alone"], cwd=folder, check=True
    )
    written, alone = (
        {path.name: path.read_bytes() for path in [*out.glob("*.tar"), out / "manifest.json"]}
        for out in (codes, folder / "alone")
    )
    assert written == alone
    assert len(written) == 5  # four shards and the manifest


@pytest.mark.slow
def test_a_transformer_trains_on_the_codes_on_two_nodes(cluster, folder, codes):
    job = cluster.submit(
        *ONE_CPU_EACH,
        REPOSITORY / "slurm/train_transformer.sh",
        "data.train=codes",
        "data.val=codes",
        "run.dir=transformer",
        *SMALL_TRANSFORMER,
        *SMALL_RUN,
        cwd=folder,
    )
    assert job.wait() == 0, job.text
    assert "batch     4 images = 2 ranks x 1 x 2 micro-batches" in job.text
    assert trained_steps(folder / "transformer") == [1, 2, 3, 4]
    trained = Transformer.from_pretrained(folder / "transformer/export")
    assert trained.config.vocabulary == 16
    assert list(trained.config.grid) == [8, 8]
