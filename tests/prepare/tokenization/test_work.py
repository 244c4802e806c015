"""Whatever happens to the workers, the shards are those of an undisturbed run."""

import json
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from taming_dist.data.codes import CodeDataset
from taming_dist.engine.workers import Worker, worker_of
from taming_dist.errors import UserError
from taming_dist.models.vqgan import VQGAN
from taming_dist.prepare.tokenization.work import tokenize
from tests.prepare.tokenization.conftest import make_job

WORKERS = Path(__file__).with_name("workers.py")
Contents = Callable[[Path], dict[str, bytes]]
Images = Callable[[int], Path]


def test_a_worker_is_numbered_by_whatever_has_started_it() -> None:
    torchrun = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}
    srun = {"SLURM_PROCID": "2", "SLURM_NTASKS": "4", "SLURM_LOCALID": "2", "SLURM_STEP_ID": "0"}
    array = {
        "SLURM_ARRAY_TASK_ID": "7",
        "SLURM_ARRAY_TASK_MIN": "5",
        "SLURM_ARRAY_TASK_COUNT": "10",
    }
    assert worker_of({}) == Worker(0, 1, 0)
    assert worker_of(torchrun) == Worker(5, 8, 1, rank=5)
    assert worker_of(srun) == Worker(2, 4, 2, rank=2)
    assert worker_of(array) == Worker(2, 10, 0)
    assert worker_of(array | srun) == Worker(10, 40, 2, rank=2)


def test_appended_image_shards_leave_the_finished_code_shards_alone(
    run: Callable[..., None], images: Images, contents: Contents, tmp_path: Path
) -> None:
    fewer, more = images(2), images(4)  # 16 and 32 images, 6 in a code shard
    run(more, tmp_path / "at once")
    run(fewer, tmp_path / "grown")
    times = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "grown").glob("*.tar")}
    run(more, tmp_path / "grown")
    assert contents(tmp_path / "grown") == contents(tmp_path / "at once")
    kept = [n for n, t in times.items() if (tmp_path / "grown" / n).stat().st_mtime_ns == t]
    assert len(times) == 3
    assert sorted(kept) == ["codes-train-000000.tar", "codes-train-000001.tar"]
    with pytest.raises(UserError, match=r"codes-train-00000\d\.tar.*(another job|holds the im)"):
        run(fewer, tmp_path / "grown")


def test_without_its_records_a_folder_is_read_again_and_kept(
    run: Callable[..., None], images: Images, contents: Contents, tmp_path: Path
) -> None:
    shards = images(2)
    run(shards, tmp_path / "out")
    whole = contents(tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / ".parts")
    times = [path.stat().st_mtime_ns for path in sorted((tmp_path / "out").glob("*.tar"))]
    run(shards, tmp_path / "out")
    assert contents(tmp_path / "out") == whole
    assert [p.stat().st_mtime_ns for p in sorted((tmp_path / "out").glob("*.tar"))] == times


def test_a_changed_byte_is_found_and_its_shard_made_again(
    run: Callable[..., None], images: Images, contents: Contents, tmp_path: Path
) -> None:
    shards = images(2)
    run(shards, tmp_path / "out")
    whole = contents(tmp_path / "out")
    path = tmp_path / "out" / "codes-train-000001.tar"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    run(shards, tmp_path / "out")
    assert contents(tmp_path / "out") == whole


def test_the_report_says_what_the_codes_are_worth(
    run: Callable[..., None], images: Images, tmp_path: Path
) -> None:
    run(images(2), tmp_path / "out")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["images"], report["left_out"], report["proven_images"]) == (16, 0, 16)
    assert report["codes_equal_to_fp32"] == 1
    assert sum(report["histogram"]) == report["counted_codes"] == 16 * 16
    assert 1 < report["codebook_perplexity"] <= 16
    assert 0 < report["psnr"] < 40
    assert "codebook_perplexity" in (tmp_path / "out" / "report.txt").read_text()


def test_a_full_disk_leaves_whole_shards_and_one_clear_line(
    run: Callable[..., None], images: Images, contents: Contents, tmp_path: Path
) -> None:
    shards = images(2)
    run(shards, tmp_path / "whole")
    size = max(path.stat().st_size for path in (tmp_path / "whole").glob("*.tar"))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1024, before[1]))
    try:
        with pytest.raises(UserError, match=r"out cannot be written .*finished shards are kept"):
            run(shards, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    left = [path.name for path in (tmp_path / "out").iterdir() if path.is_file()]
    whole = contents(tmp_path / "whole")
    assert all(whole[name] == (tmp_path / "out" / name).read_bytes() for name in left)
    run(shards, tmp_path / "out")
    assert contents(tmp_path / "out") == whole


def at_once(*arguments: object) -> str:
    """Several workers, perhaps after others were killed: see workers.py."""
    command = [sys.executable, str(WORKERS), *map(str, arguments)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_four_workers_at_once_make_the_shards_of_one(
    run: Callable[..., None], images: Images, contents: Contents, model: Path, tmp_path: Path
) -> None:
    shards = images(4)
    run(shards, tmp_path / "one")
    at_once(model, shards, tmp_path / "four", 4, 0)
    assert contents(tmp_path / "four") == contents(tmp_path / "one")
    assert len(contents(tmp_path / "one")) == 7
    assert not list((tmp_path / "four" / ".parts").glob("*.claim"))


@pytest.mark.slow
def test_workers_killed_at_random_moments_change_no_byte(
    run: Callable[..., None], images: Images, contents: Contents, model: Path, tmp_path: Path
) -> None:
    shards = images(8)
    run(shards, tmp_path / "undisturbed")
    said = at_once(model, shards, tmp_path / "out", 3, 20)
    assert "20 " in said
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")
    assert CodeDataset.open(str(tmp_path / "out")).num_samples == 64


def test_images_that_the_model_has_no_codes_for_are_refused_with_one_line(
    model: Path, images: Images, tmp_path: Path
) -> None:
    vqgan = VQGAN.from_pretrained(model)
    with torch.no_grad():
        vqgan.quant_conv.bias[0] = torch.inf
    vqgan.save_pretrained(tmp_path / "broken")
    job = make_job(tmp_path / "broken", images(1), tmp_path / "out")
    with pytest.raises(
        UserError, match="latents that are not finite for 0000: use --precision fp32"
    ):
        tokenize(job, Worker(0, 1, 0), batch=4, threads=1, stale_s=1.0)
    assert not list((tmp_path / "out").glob("*.tar"))
