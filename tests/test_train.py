"""Real runs of `python -m taming_dist.train`: Ctrl-C and going on, two ranks, what the sinks say.

One run is interrupted and resumed, one goes through, one goes through on two ranks, all over the
same data; everything else reads what they left.
"""

import gzip
import io
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from taming_dist import train
from taming_dist.engine.tf32 import TF32_CHOICES, use_tf32
from taming_dist.engine.world import choose_device
from taming_dist.formats.manifest import resolve
from taming_dist.models.vqgan import VQGAN
from taming_dist.processes import state_of
from taming_dist.training.console import LEFT, left
from taming_dist.training.recipe import numbers
from tests.data.shard_files import writing_shards
from tests.wandb_files import artifacts, history, records

LAUNCHER = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "SLURM_PROCID",
    "WANDB_MODE",
    "WANDB_API_KEY",
)
SETTINGS = [
    "+experiment=flickr",
    "+scale=laptop",
    "data.train=train",
    "data.val=val",
    "model/quantizer=ema",
    "model.quantizer.codes=32",
    "model.quantizer.dim=8",
    "model.resolution=32",
    "model.multipliers=[1,1,1]",
    "data.size=32",
    "loss.terms.perceptual.net=alex",
    "loss.terms.perceptual.weights=random",
    "loss.disc_start=2",
    "loss.discriminator.channels=8",
    "optim.lr=1e-4",
    "data.global_batch=4",
    "data.micro_batch=4",
    "data.lanes=4",
    "data.block=4",
    "train.log_every=1",
    "train.checkpoint_every=3",
    "train.validate_every=3",
    "train.validate_images=3",
    "train.preview_every=4",
    "train.preview_images=2",
    "log.wandb=offline",
    "log.group=the chain",
]
COUNTS = "val/codebook_counts"
PROFILED = ["+debug=profile", "debug.after=2", "debug.steps=2"]
UNSTABLE = re.compile("time$|throughput/|ranks/")
Line = dict[str, Any]


def make_images(folder: Path, seed: int, count: int) -> None:
    with writing_shards(folder, "images", 8) as write:
        for number in range(count):
            rng = np.random.default_rng([seed, number])
            small = rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)
            file = io.BytesIO()
            Image.fromarray(small).resize((44, 40), Image.Resampling.BILINEAR).save(file, "PNG")
            write(f"{number:04d}", {"png": file.getvalue()})


class Runs:
    """Starts runs in one folder and remembers their processes, so that none is left behind."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.processes: list[subprocess.Popen] = []

    def start(
        self, *overrides: str, node: str = ".", before: Sequence[str] = (), **variables: str
    ) -> subprocess.Popen:
        """Start a rank in a folder below this one; `before`: a command that is given its own."""
        environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
        environment |= {"OMP_NUM_THREADS": "1", "NETRC": "/dev/null"} | variables
        process = subprocess.Popen(
            [*before, sys.executable, "-m", "taming_dist.train", *overrides],
            cwd=self.folder / node,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # a process group of its own, as a terminal gives it
        )
        self.processes.append(process)
        return process

    def lines(self, name: str, file: str = "metrics.jsonl") -> list[Line]:
        path = self.folder / "outputs" / name / file
        whole = path.read_text().split("\n")[:-1] if path.is_file() else []
        return [json.loads(line) for line in whole]

    def end(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def finish(process: subprocess.Popen) -> str:
    out, err = process.communicate(timeout=200)
    assert process.returncode == 0, err[-3000:]
    return out


def wait_for(condition: Callable[[], bool], process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Runs]:
    folder = tmp_path_factory.mktemp("runs")
    make_images(folder / "train", seed=0, count=20)
    make_images(folder / "val", seed=1, count=5)
    made = Runs(folder)
    yield made
    made.end()


@pytest.fixture(scope="module")
def stopped_at(runs: Runs) -> int:
    """The step at which Ctrl-C stopped the run `parts`."""
    told = runs.folder / "stopped.json"
    process = runs.start(
        *SETTINGS, "run.name=parts", "train.steps=100000", TAMING_DIST_END=str(told)
    )
    wait_for(lambda: len(runs.lines("parts")) >= 4, process)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: W&B's own process gets it too
    out = finish(process)
    (asked,) = [line for line in runs.lines("parts", "events.jsonl") if line["event"] == "signal"]
    assert asked["signal"] == "SIGINT"
    assert f"stopped at step {asked['step']} of 100000: the same command resumes from here" in out
    assert json.loads(told.read_text()) == {
        "finished": False,
        "step": asked["step"],
        "images": asked["samples"],
        "reason": "stopped by SIGINT",
    }
    return asked["step"]


def is_gone(process: int) -> bool:
    """Whether a process that was killed ends soon (one that nobody waits for may stay a zombie)."""
    deadline = time.monotonic() + 60
    while state_of(process) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not state_of(process)


def meeting_of_two() -> dict[str, str]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = str(listener.getsockname()[1])
    return {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}


@pytest.fixture(scope="module")
def outputs(runs: Runs, stopped_at: int) -> dict[str, str]:
    """What `parts`, resumed, and `whole`, on one rank, and `pair`, on two, printed."""
    steps = f"train.steps={stopped_at + 3}"
    master = meeting_of_two()
    alone: dict[str, Sequence[str]] = {"parts": (), "whole": PROFILED}
    started = {
        name: runs.start(
            *SETTINGS, f"run.name={name}", steps, *more, TAMING_DIST_END=f"{name}.json"
        )
        for name, more in alone.items()
    }
    found = {name: finish(started[name]) for name in alone}
    for rank in ("0", "1"):
        started[f"pair{rank}"] = runs.start(
            *SETTINGS,
            "run.name=pair",
            steps,
            "data.micro_batch=2",
            "log.wandb=disabled",
            RANK=rank,
            LOCAL_RANK=rank,
            **master,
        )
    return found | {name: finish(started[name]) for name in ("pair0", "pair1")}


@pytest.mark.parametrize("asked", ["none", "all"])
def test_a_run_uses_tf32_where_its_configuration_says_so(
    runs: Runs, monkeypatch: pytest.MonkeyPatch, asked: str
) -> None:
    class Reached(Exception):
        pass

    def reached(*given: Any) -> None:
        choose_device(*given)
        raise Reached

    monkeypatch.chdir(runs.folder)
    monkeypatch.setattr(sys, "argv", ["train.py", *SETTINGS, f"engine.tf32={asked}"])
    monkeypatch.setattr("taming_dist.engine.start.rendezvous", lambda here: {})
    monkeypatch.setattr("taming_dist.engine.start.load_deepspeed", lambda: None)
    monkeypatch.setattr("taming_dist.engine.start.choose_device", reached)
    monkeypatch.setattr("taming_dist.engine.onednn.mkl_is_slow", lambda: False)
    use_tf32(TF32_CHOICES["none" if asked == "all" else "all"])
    with pytest.raises(Reached):
        train.main()
    assert torch.backends.cuda.matmul.allow_tf32 is (asked == "all")
    assert torch.backends.cudnn.allow_tf32 is (asked == "all")


def stable(lines: list[Line]) -> list[Line]:
    return [
        {name: value for name, value in line.items() if not UNSTABLE.search(name)} for line in lines
    ]


def test_a_run_stopped_by_ctrl_c_goes_on_where_it_was_to_the_bit(
    runs: Runs, outputs: dict[str, str], stopped_at: int
) -> None:
    whole, parts = stable(runs.lines("whole")), stable(runs.lines("parts"))
    trained = [line for line in whole if "train/loss" in line]
    assert [line["step"] for line in trained] == list(range(1, stopped_at + 4))
    assert parts == whole
    assert f"resumed at step {stopped_at}" in outputs["parts"]
    assert {"train/gan_d", "train/adaptive_weight", "train/codebook_usage"} < trained[-1].keys()


def test_a_resumed_run_exports_what_the_whole_run_exports(
    runs: Runs, outputs: dict[str, str]
) -> None:
    prints = [
        VQGAN.from_pretrained(runs.folder / "outputs" / name / "export").fingerprint
        for name in ("parts", "whole")
    ]
    assert prints[0] == prints[1]


def test_two_ranks_log_what_one_logs(runs: Runs, outputs: dict[str, str]) -> None:
    one, two = stable(runs.lines("whole")), stable(runs.lines("pair"))
    assert len(one) == len(two)
    for line, other in zip(two, one, strict=True):
        counts, others = (np.array(each.pop(COUNTS, [])) for each in (line, other))
        # a latent that lies between two codes may take the other one
        assert np.abs(counts - others).sum() <= 0.02 * others.sum()
        # the norms in the adaptive weight jump where a leaky ReLU takes another side
        assert line == pytest.approx(other, rel=4e-3, abs=1e-4), f"step {line['step']}"


def test_validation_covers_as_many_images_as_asked_for_on_one_rank_and_on_two(
    runs: Runs, outputs: dict[str, str]
) -> None:
    for name in ("parts", "whole", "pair"):
        validated = [line for line in runs.lines(name) if "val/psnr" in line]
        assert {line["val/images"] for line in validated} == {3}
        end = runs.lines(name)[-1]["step"]
        assert {line["step"] for line in validated} == {*range(3, end, 3), end}


def test_only_the_first_rank_prints_and_writes(runs: Runs, outputs: dict[str, str]) -> None:
    assert "batch     4 images = 2 ranks x 2 x 1 micro-batches" in outputs["pair0"]
    assert outputs["pair1"] == ""
    steps = [line["step"] for line in runs.lines("pair") if "train/loss" in line]
    assert steps == sorted(set(steps))
    starts = [line["event"] for line in runs.lines("pair", "events.jsonl")].count("start")
    assert starts == 1
    logs = sorted(path.name for path in (runs.folder / "outputs/pair/logs").iterdir())
    assert logs == ["rank-0.log", "rank-1.log"]


def test_events_tell_the_story(runs: Runs, outputs: dict[str, str], stopped_at: int) -> None:
    told = [(line["event"], line["step"]) for line in runs.lines("parts", "events.jsonl")]
    end = stopped_at + 3
    cadence = [step for step in range(3, stopped_at, 3)]
    first = [
        ("start", 0),
        *(("save", step) for step in cadence),
        ("save", stopped_at),
        ("signal", stopped_at),
        ("exit", stopped_at),
    ]
    again = [step for step in range(stopped_at + 1, end) if step % 3 == 0]
    second = [
        ("resume", stopped_at),
        *(("save", step) for step in again),
        ("save", end),
        ("exit", end),
    ]
    assert told == first + second
    ends = [line for line in runs.lines("parts", "events.jsonl") if line["event"] == "exit"]
    assert [line["reason"] for line in ends] == ["stopped by SIGINT", "finished"]
    assert [line["finished"] for line in ends] == [False, True]
    assert json.loads((runs.folder / "parts.json").read_text())["finished"] is True


def test_a_run_leaves_what_the_documents_promise(runs: Runs, outputs: dict[str, str]) -> None:
    folder = runs.folder / "outputs" / "whole"
    steps = [line["step"] for line in runs.lines("whole") if "train/loss" in line]
    names = {path.name for path in folder.iterdir()}
    assert {
        "config.yaml",
        "metrics.jsonl",
        "events.jsonl",
        "images",
        "checkpoints",
        "export",
        "wandb",
        "logs",
    } <= names
    assert not list(folder.rglob("*.tmp"))
    kept = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert kept[-1] == f"images-{4 * steps[-1]:012d}"
    assert len(kept) == 2
    drawn = sorted(path.name for path in (folder / "images").iterdir())
    due = [step for step in steps if step % 4 == 0 or step == steps[-1]]
    assert drawn == [f"images-{4 * step:012d}.png" for step in due]


# The three places that metrics go to


def test_metrics_wandb_and_console_agree(runs: Runs, outputs: dict[str, str]) -> None:
    lines = runs.lines("whole")
    assert any("val/psnr" in line for line in lines)
    renamed = {"step": "trainer/step", "samples": "trainer/samples"}
    expected = [
        {renamed.get(name, name): value for name, value in numbers(line).items() if name != "time"}
        for line in lines
    ]
    logged = history(runs.folder / "outputs" / "whole")
    told = [line for line in logged if any(name.startswith("events/") for name in line)]
    rest = [line for line in logged if line not in told]
    plain = [
        {name: value for name, value in line.items() if not name.startswith(COUNTS)}
        for line in rest
    ]
    assert plain == expected
    histograms = [line for line in rest if f"{COUNTS}/values" in line]
    validated = [line for line in lines if COUNTS in line]
    assert [line[f"{COUNTS}/values"] for line in histograms] == [line[COUNTS] for line in validated]
    assert all(line[f"{COUNTS}/bins"] == list(range(33)) for line in histograms)
    saves = [line for line in runs.lines("whole", "events.jsonl") if line["event"] == "save"]
    assert [
        (line["trainer/samples"], line["events/save_stall_s"])
        for line in told
        if "events/save" in line
    ] == [(line["samples"], line["stall_s"]) for line in saves]
    assert any("events/exit_goodput" in line for line in told)

    said = [line for line in outputs["whole"].splitlines() if line.startswith("step ")]
    assert len(said) == len(lines)
    for text, line in zip(said, lines, strict=True):
        head, *pairs = text.split("  ")
        remaining = left(line.get(LEFT))
        assert head == f"step {line['step']}/{lines[-1]['step']}{remaining}"
        told = dict(pair.rsplit(" ", 1) for pair in pairs)
        assert told.keys() == line.keys() - {"step", "samples", "time", LEFT, COUNTS}
        for name, number in told.items():
            assert math.isclose(float(number), line[name], rel_tol=1e-5, abs_tol=1e-30), name


def test_wandb_knows_what_a_run_has_read_and_made_and_how_its_machine_fared(
    runs: Runs, outputs: dict[str, str]
) -> None:
    folder = runs.folder / "outputs" / "whole"
    read = [each for each in artifacts(folder) if each.used]
    shards = [resolve(str(runs.folder / name)) for name in ("train", "val")]
    assert [each.name for each in read] == [f"images-{each.fingerprint[:12]}" for each in shards]
    assert [each.facts["samples"] for each in read] == [each.num_samples for each in shards]
    assert {each.files for each in read} == {frozenset({"artifact.json", "manifest.json"})}
    (made,) = (each for each in artifacts(folder) if not each.used)
    assert made.name == f"vqgan-{VQGAN.from_pretrained(folder / 'export').fingerprint[:12]}"
    assert made.files == {"artifact.json", "config.json"}
    assert made.facts["place"] == str(folder / "export")
    (begun,) = records(folder, "run")
    assert (begun.run_group, begun.job_type) == ("the chain", "train")
    assert any(
        item.key.startswith("proc.") for each in records(folder, "stats") for item in each.item
    )


# A full disk

CAN_MOUNT = subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode == 0
ON_A_SMALL_DISK = """
mount -t tmpfs -o size=1500k tmpfs outputs/small
"$@"; echo "exit $?"
ls -A outputs/small/checkpoints
mount -o remount,size=64m outputs/small
"$@" || exit
ls -A outputs/small outputs/small/checkpoints
"""


@pytest.mark.slow
@pytest.mark.skipif(not CAN_MOUNT, reason="mounting a small disk takes root")
def test_a_full_disk_is_one_line_and_the_same_command_continues_once_there_is_room(
    runs: Runs,
) -> None:
    """The export fits, the checkpoint does not; W&B writes to the same disk."""
    (runs.folder / "outputs" / "small").mkdir(parents=True)
    small = ("run.name=small", "train.steps=2", "loss.disc_start=9")
    before = ("unshare", "--mount", "sh", "-c", ON_A_SMALL_DISK, "sh")
    process = runs.start(*SETTINGS, *small, before=before)
    out, err = process.communicate(timeout=200)
    first, _, second = out.partition("exit 2\n")
    assert [line for line in err.splitlines() if not line.startswith("WARNING: LPIPS")] == [
        "error: outputs/small/checkpoints cannot be written (No space left on device): make room "
        "on its disk, then run the same command again"
    ]
    assert "step 2/2  " in first
    assert process.returncode == 0
    assert "stopped at step 2 of 2: the trained model is in outputs/small/export" in second
    assert "images-000000000008\n" in second
    assert ".tmp" not in second
    assert ".export-" not in second


# Launchers

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--no-python")


@pytest.mark.slow
def test_ranks_save_and_end_with_a_torchrun_that_is_killed_and_until_then_their_folder_is_theirs(
    runs: Runs,
) -> None:
    """USR1, Slurm's warning, kills torchrun; its ranks would train on, and a second start too."""
    settings = [*SETTINGS, "run.name=launched", "data.micro_batch=2", "log.wandb=disabled"]
    settings += ["train.steps=100000", "train.checkpoint_every=0", "train.validate_every=0"]
    launcher = runs.start(*settings, before=(*TORCHRUN, "--nproc_per_node=2"))
    wait_for(lambda: len(runs.lines("launched")) >= 2, launcher)
    claim = runs.folder / "outputs/launched/run.claim"
    held = json.loads(claim.read_text())
    second = runs.start(*settings)
    out, err = second.communicate(timeout=100)
    assert (second.returncode, out) == (2, "")
    assert err.startswith(
        f"error: run.dir=outputs/launched is in use by process {held['pid']} on {held['host']}"
    )
    assert err.count("\n") == 1

    launcher.send_signal(signal.SIGUSR1)
    out, _ = launcher.communicate(timeout=100)  # the ranks hold its pipes, too
    assert launcher.returncode == -signal.SIGUSR1
    events = [
        (line["event"], line.get("reason")) for line in runs.lines("launched", "events.jsonl")
    ]
    assert events[-1] == ("exit", "the launcher of rank 0 has ended")
    assert ("save", None) in events
    assert not claim.exists()


@pytest.mark.slow
def test_a_run_outlives_its_terminal_and_saves_when_that_says_so(runs: Runs) -> None:
    settings = [*SETTINGS, "run.name=left", "train.steps=100000", "log.wandb=disabled"]
    process = runs.start(*settings, "train.validate_every=0", "train.checkpoint_every=0")
    assert process.stdout is not None
    process.stdout.readline()
    process.stdout.close()  # train | head -1
    wait_for(lambda: len(runs.lines("left")) >= 3, process)
    process.send_signal(signal.SIGHUP)
    process.stdout = None
    _, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    events = [(line["event"], line.get("reason")) for line in runs.lines("left", "events.jsonl")]
    assert events[-1] == ("exit", "stopped by SIGHUP")
    assert ("save", None) in events
    log = (runs.folder / "outputs/left/logs/rank-0.log").read_text()
    assert log.count("stdout cannot be written any more (Broken pipe)") == 1


# Mistakes


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["data.sise=64"], "did you mean 'size'?"),
        (["data.train=nowhere"], "python tools/make_shards.py"),
    ],
)
def test_a_mistake_is_one_line_on_stderr_exit_code_2_and_nothing_on_disk(
    runs: Runs, overrides: list[str], expected: str
) -> None:
    process = runs.start(*SETTINGS, "run.name=mistaken", *overrides)
    out, err = process.communicate(timeout=100)
    assert (process.returncode, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert expected in err
    assert not (runs.folder / "outputs" / "mistaken").exists()


@pytest.mark.slow
def test_another_number_of_ranks_at_another_stage_resumes_a_run(
    runs: Runs, outputs: dict[str, str], stopped_at: int
) -> None:
    """Numbers of such runs are compared in tests/engine/test_elastic.py."""
    steps = stopped_at + 5
    out = finish(
        runs.start(
            *SETTINGS, "run.name=pair", f"train.steps={steps}", "log.wandb=disabled", "engine=zero2"
        )
    )
    assert f"resumed at step {stopped_at + 3}" in out
    trained = [line for line in runs.lines("pair") if "train/loss" in line]
    assert [line["step"] for line in trained] == list(range(1, steps + 1))
    assert all(math.isfinite(line["train/loss"]) for line in trained)


@pytest.mark.slow
def test_an_error_of_one_rank_in_the_middle_of_training_ends_both_and_is_heard_once(
    runs: Runs, tmp_path: Path
) -> None:
    """Each rank reads the disk of its own node, and the disk of rank 1 goes bad."""
    folder = runs.folder / "outputs" / "broken"
    settings = [*SETTINGS, f"run.dir={folder}", "run.name=broken", "train.steps=100000"]
    settings += ["data.micro_batch=2", "log.wandb=disabled", "train.checkpoint_every=0"]
    settings += ["train.validate_every=0", "train.preview_every=0"]
    master = meeting_of_two() | {"TMPDIR": str(tmp_path)}
    ranks = []
    for rank in ("0", "1"):
        node = f"node{rank}"
        for split in ("train", "val"):
            shutil.copytree(runs.folder / split, runs.folder / node / split)
        ranks.append(runs.start(*settings, node=node, RANK=rank, LOCAL_RANK=rank, **master))
    wait_for(lambda: len(runs.lines("broken")) >= 3, ranks[0])
    for shard in (runs.folder / "node1" / "train").glob("*.tar"):
        with open(shard, "r+b") as file:
            damaged = file.read().replace(b"\x89PNG", b"\0\0\0\0")
            file.seek(0)
            file.write(damaged)

    # long before the timeout of the process group, which is half an hour
    errors = [process.communicate(timeout=60)[1].splitlines() for process in ranks]
    assert [process.returncode for process in ranks] == [1, 2]
    (line,) = [line for lines in errors for line in lines if not line.startswith("WARNING")]
    assert line.startswith("error: rank 1: ")
    assert "train/images-00000" in line

    events = runs.lines("broken", "events.jsonl")
    assert [event["event"] for event in events] == ["start", "error", "exit"]
    assert events[1]["rank"] == 1
    assert events[1]["step"] >= 2
    assert line == f"error: rank 1: {events[1]['reason']}"
    assert events[2]["reason"].startswith(f"rank 1 (process {ranks[1].pid} on ")
    assert events[1]["reason"] in (folder / "logs" / "rank-1.log").read_text()
    assert "Traceback" in (folder / "logs" / "rank-0.log").read_text()


@pytest.mark.slow
def test_a_run_that_waits_for_data_in_vain_saves_its_last_step_when_asked_to_stop(
    runs: Runs,
) -> None:
    off = [f"train.{what}_every=0" for what in ("validate", "preview", "checkpoint")]
    settings = [*SETTINGS, *off, "run.name=waiting", "train.steps=100000", "log.wandb=disabled"]
    process = runs.start(*settings)
    wait_for(lambda: len(runs.lines("waiting")) >= 3, process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    (child,) = [n for n in children if "taming_dist" in Path(f"/proc/{n}/cmdline").read_text()]
    os.kill(int(child), signal.SIGSTOP)
    seen = -1
    while seen < (seen := len(runs.lines("waiting"))):
        time.sleep(3)  # it uses up the batches that it has
    process.terminate()
    finish(process)
    assert is_gone(int(child))
    told = [(line["event"], line["step"]) for line in runs.lines("waiting", "events.jsonl")]
    last = runs.lines("waiting")[-1]["step"]
    assert told == [("start", 0), ("save", last), ("signal", last), ("exit", last)]


@pytest.mark.slow
def test_a_data_process_that_hangs_ends_the_run_in_one_line_that_says_so(runs: Runs) -> None:
    off = ("validate", "preview", "checkpoint")
    settings = [*SETTINGS, *(f"train.{what}_every=0" for what in off), "run.name=hung"]
    settings += ["train.steps=100000", "train.stuck_after=10", "log.wandb=disabled"]
    process = runs.start(*settings)
    wait_for(lambda: len(runs.lines("hung")) >= 3, process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    (child,) = [n for n in children if "taming_dist" in Path(f"/proc/{n}/cmdline").read_text()]
    os.kill(int(child), signal.SIGSTOP)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 75
    (line,) = [line for line in err.splitlines() if not line.startswith("WARNING")]
    assert f"waiting for data, where its process {child} is stopped (taming_dist/data/" in line
    assert is_gone(int(child))
    assert [event["event"] for event in runs.lines("hung", "events.jsonl")] == ["start", "exit"]


def test_a_profiled_run_has_a_trace_of_its_steps_and_its_ten_most_expensive_operations(
    runs: Runs, outputs: dict[str, str]
) -> None:
    """That its numbers are those of one that is not profiled is told by all that compares `whole`
    with `parts`."""
    folder = runs.folder / "outputs" / "whole" / "profile"
    with gzip.open(folder / "rank-0.json.gz") as file:
        names = [event.get("name", "") for event in json.load(file)["traceEvents"]]
    assert sorted(name for name in names if name.startswith("ProfilerStep#")) == [
        "ProfilerStep#2",
        "ProfilerStep#3",
    ]
    table = (folder / "rank-0.txt").read_text()
    heading, *rows, whole = table.splitlines()
    assert heading.split() == ["ms", "a", "step", "share", "calls", "operation"]
    spent = [float(row.split()[0]) for row in rows]
    assert len(rows) == 10
    assert spent == sorted(spent, reverse=True)
    assert 0 < sum(spent) <= float(whole.split()[0])
    assert "aten::mkldnn_convolution" in table
    assert table in outputs["whole"]
