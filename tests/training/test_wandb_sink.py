"""W&B cannot stop a run nor keep it waiting: what fails in it, hangs or dies is told once."""

import os
import re
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from taming_dist.errors import UserError
from taming_dist.training.clock import Clock
from taming_dist.training.sinks import open_sinks
from taming_dist.training.wandb_sink import MOST_BARS, LogConfig, WandB, bars_of, wandb_mode
from taming_dist.training.wandb_steps import Steps
from tests.training.test_sinks import BLACK, CLOCK, at, steps


class Broken:
    """A W&B run in which everything fails, as without network or disk."""

    def __getattr__(self, name: str) -> Any:
        def fail(*_: Any, **__: Any) -> None:
            raise OSError(f"{name} is broken")

        return fail


def fake_wandb(monkeypatch: pytest.MonkeyPatch, run: Any) -> None:
    module = ModuleType("wandb")
    module.Settings = SimpleNamespace  # type: ignore[attr-defined]
    module.Image = lambda path, caption: (path, caption)  # type: ignore[attr-defined]
    module.init = run if callable(run) else lambda **_: run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)


def refuse(**_: Any) -> None:
    raise RuntimeError("no such entity")


class BreaksLater(SimpleNamespace):
    """A W&B run that starts well and then fails."""

    def define_metric(self, *_: Any, **__: Any) -> None:
        pass

    def log(self, record: dict[str, float]) -> None:
        raise OSError("no space left on device")


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (refuse, "RuntimeError: no such entity"),
        (Broken(), "OSError: define_metric is broken"),
        (BreaksLater(), "OSError: no space left on device"),
        (None, "AttributeError"),
    ],
)
def test_whatever_breaks_in_wandb_is_said_once_and_the_metrics_go_on(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    run: Any,
    message: str,
) -> None:
    fake_wandb(monkeypatch, run if run is not None else SimpleNamespace())
    with open_sinks(LogConfig(wandb="offline"), tmp_path, "run", CLOCK, {}) as sinks:
        for step in (1, 2):
            sinks.log(at(step), {"a": 1.0})
            sinks.image(at(step), BLACK)
    assert steps(tmp_path) == [1, 2]
    err = capsys.readouterr().err
    assert err.count("W&B is off") == 1
    assert message in err


def test_a_resumed_run_goes_on_under_the_same_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[dict[str, Any]] = []

    def init(**settings: Any) -> Any:
        begun.append(settings)
        return SimpleNamespace(define_metric=lambda *_, **__: None, finish=lambda **_: None)

    fake_wandb(monkeypatch, init)
    for _ in range(2):
        WandB(LogConfig(wandb="offline"), tmp_path, "run", {"seed": 1}).close(failed=False)
    assert begun[0]["id"] == begun[1]["id"]
    assert {settings["resume"] for settings in begun} == {"allow"}
    assert {settings["mode"] for settings in begun} == {"offline"}


class Online(SimpleNamespace):
    """A run at a server, whose rows have steps of its own."""

    step = 0

    def define_metric(self, *_: Any, **__: Any) -> None:
        pass

    def log(self, record: dict[str, float]) -> None:
        self.step += 1

    def finish(self, exit_code: int) -> None:
        pass


def online_starts(
    monkeypatch: pytest.MonkeyPatch, folder: Path, last: int, resumed_at: int, can_rewind: bool
) -> list[dict[str, Any]]:
    """How the second of two starts begins its run: the first has logged at images 4, 8, ... until
    `last`, and the second resumes after `resumed_at`."""
    begun: list[dict[str, Any]] = []

    def init(**settings: Any) -> Online:
        begun.append(settings)
        if "resume_from" in settings and not can_rewind:
            raise RuntimeError("not enabled for this server")
        return Online()

    fake_wandb(monkeypatch, init)
    for resumed, logged in ((0, range(4, last + 1, 4)), (resumed_at, ())):
        run = WandB(LogConfig(wandb="online"), folder, "run", {})
        run.rewind(Clock(4, 100, resumed))
        for images in logged:
            run.log(Clock(4, 100, images), {"a": 1.0})
            run.event("save", Clock(4, 100, images), {})
        run.close(failed=False)
    return begun[1:]


def test_online_a_run_is_rewound_to_where_it_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two rows for each step, numbered from 0: those of 4 and 8 images are rows 0 to 3."""
    (second,) = online_starts(monkeypatch, tmp_path, last=20, resumed_at=8, can_rewind=True)
    assert second["resume_from"] == f"{second['id']}?_step=3"
    assert "resume" not in second
    steps = Steps(tmp_path)
    for images, step in ((8, 4), (12, 5), (16, 6)):  # what the server numbers from there on
        steps.note(images, step)
    assert steps.before(12) == 5
    assert steps.before(16) is None


@pytest.mark.parametrize("resumed_at", [0, 20])
def test_a_run_with_nothing_to_keep_or_to_rewind_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resumed_at: int
) -> None:
    (second,) = online_starts(monkeypatch, tmp_path, 20, resumed_at, can_rewind=True)
    assert second["resume"] == "allow"


def test_where_the_server_cannot_rewind_the_run_goes_on_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    refused, second = online_starts(monkeypatch, tmp_path, 20, resumed_at=8, can_rewind=False)
    assert "resume_from" in refused
    assert second["resume"] == "allow"
    assert refused["id"] == second["id"]
    assert "W&B is off" not in capsys.readouterr().err


def test_a_run_that_ends_before_it_resumes_is_not_rewound(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[dict[str, Any]] = []
    fake_wandb(monkeypatch, lambda **settings: begun.append(settings) or Online())
    (tmp_path / "wandb-id").write_text("0123abcd")
    Steps(tmp_path).note(4, 0)
    WandB(LogConfig(wandb="online"), tmp_path, "run", {}).close(failed=True)
    assert [settings.get("resume") for settings in begun] == ["allow"]


def test_an_artifact_that_cannot_be_described_costs_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    logged: list[dict[str, float]] = []
    run = Online(log=logged.append)
    fake_wandb(monkeypatch, run)

    def describe() -> Any:
        raise UserError("there is no such folder")

    with open_sinks(LogConfig(wandb="offline"), tmp_path, "run", CLOCK, {}) as sinks:
        sinks.artifact(describe, made=False)
        sinks.log(CLOCK, {"a": 1.0})
    assert [record["a"] for record in logged] == [1.0]
    assert capsys.readouterr().err == ""


def test_without_artifacts_none_is_even_described(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_wandb(monkeypatch, Online())
    described: list[str] = []
    config = LogConfig(wandb="offline", artifacts="none")
    with open_sinks(config, tmp_path, "run", CLOCK, {}) as sinks:
        sinks.artifact(lambda: described.append("it"), made=True)  # type: ignore[func-returns-value, arg-type, return-value]
    assert not described


def test_a_histogram_has_the_uses_of_each_code_and_of_large_codebooks_those_of_ranges() -> None:
    uses, edges = bars_of([3, 0, 1])
    assert uses.tolist() == [3, 0, 1]
    assert edges.tolist() == [0, 1, 2, 3]
    uses, edges = bars_of([1] * 1000)
    assert len(uses) == MOST_BARS
    assert uses.sum() == 1000
    assert (edges[0], edges[-1]) == (0, 1000)


@pytest.mark.parametrize("damage", [b"", b"\n", b"\0\0\0\0", b"\xff\xfe", b"a/b"])
def test_an_empty_or_damaged_id_is_replaced_by_a_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: bytes
) -> None:
    begun: list[str] = []

    def init(id: str, **_: Any) -> Any:
        begun.append(id)
        return SimpleNamespace(define_metric=lambda *_, **__: None, finish=lambda **_: None)

    fake_wandb(monkeypatch, init)
    (tmp_path / "wandb-id").write_bytes(damage)
    for _ in range(2):
        WandB(LogConfig(wandb="offline"), tmp_path, "run", {"seed": 1}).close(failed=False)
    assert re.fullmatch("[0-9a-f]{8}", begun[0])
    assert begun[1] == begun[0]
    assert [path.name for path in tmp_path.iterdir()] == ["wandb-id"]


def test_a_disabled_wandb_is_not_even_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    sinks = open_sinks(LogConfig(wandb="disabled"), tmp_path, "run", CLOCK, {})
    sinks.log(CLOCK, {"a": 1.0})
    assert not (tmp_path / "wandb-id").exists()


@pytest.mark.parametrize(
    ("asked", "variables", "netrc", "expected"),
    [
        ("auto", {}, "", "offline"),
        ("auto", {"WANDB_API_KEY": "k"}, "", "online"),
        ("auto", {"WANDB_API_KEY": "k", "WANDB_MODE": "offline"}, "", "offline"),
        ("auto", {}, "machine api.wandb.ai\n  login user\n  password k\n", "online"),
        ("auto", {}, "machine example.org\n", "offline"),
        ("disabled", {"WANDB_API_KEY": "k"}, "", "disabled"),
        ("online", {}, "", "online"),
    ],
)
def test_wandb_is_online_only_where_a_key_is_configured(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    asked: str,
    variables: dict[str, str],
    netrc: str,
    expected: str,
) -> None:
    (tmp_path / "netrc").write_text(netrc)
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in (variables | {"NETRC": str(tmp_path / "netrc")}).items():
        monkeypatch.setenv(name, value)
    assert wandb_mode(LogConfig(wandb=asked)) == expected


def test_an_unknown_choice_of_artifacts_is_the_users_mistake() -> None:
    with pytest.raises(UserError, match=r"log\.artifacts=all: use none or references or files"):
        LogConfig(artifacts="all")


def test_an_unknown_wandb_mode_is_the_users_mistake() -> None:
    with pytest.raises(UserError, match=r"log\.wandb=on: use online, offline, disabled or auto"):
        LogConfig(wandb="on")


@pytest.mark.parametrize("error", [None, OSError("no space left on device")])
def test_wandb_is_told_whether_the_run_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception | None
) -> None:
    codes: list[int] = []
    run = SimpleNamespace(
        define_metric=lambda *_, **__: None, finish=lambda exit_code: codes.append(exit_code)
    )
    fake_wandb(monkeypatch, run)
    with (
        suppress(OSError),
        open_sinks(LogConfig(wandb="offline"), tmp_path, "run", CLOCK, {}),
    ):
        if error is not None:
            raise error
    assert codes == [int(error is not None)]


RUN = """
import os, signal, sys, time
from pathlib import Path
from taming_dist.processes import children, name_of, state_of
from taming_dist.training import wandb_sink
from taming_dist.training.clock import Clock
from taming_dist.training.sinks import open_sinks
if core := os.environ.get("CORE"):
    from wandb.sdk.lib.service import service_process
    service_process.get_core_path = lambda: core
wandb_sink.LAST_S = float(os.environ.get("LAST_S", 2))
folder, what, calls = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
with open_sinks(wandb_sink.LogConfig("offline"), folder, "a", Clock(4, 10), {}) as sinks:
    sinks.rewind(Clock(4, 10))
    service = []
    while not service and what:
        service = [child for child in children() if name_of(child) == wandb_sink.SERVICE]
        time.sleep(0.01)
    if what.startswith("SIG"):
        while not list(folder.glob("wandb/offline-*/run-*.wandb")):
            time.sleep(0.01)
        os.kill(service[0], getattr(signal, what))
    for step in range(calls):
        sinks.log(Clock(4, 10, 4 * step), {f"a{number}": 1.0 for number in range(20)})
assert not any(name_of(child) == wandb_sink.SERVICE and state_of(child) for child in children())
print("went on")
"""


def run(folder: Path, what: str, calls: int = 3, **variables: str) -> list[str]:
    """The lines on stderr of a process with real sinks, to whose wandb-core something happens."""
    environment = os.environ | {"NETRC": "/dev/null", **variables}
    environment.pop("WANDB_MODE", None)
    command = [sys.executable, "-c", RUN, str(folder), what, str(calls)]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("\nwent on\n")
    return done.stderr.splitlines()


def test_a_process_of_wandb_that_is_killed_costs_a_line(tmp_path: Path) -> None:
    (line,) = run(tmp_path, "SIGKILL")
    assert line.startswith("W&B is off: ")
    assert steps(tmp_path) == [0, 1, 2]


@pytest.mark.slow
@pytest.mark.parametrize("calls", [3, 3000])
def test_a_process_of_wandb_that_is_stopped_costs_a_line_and_seconds(
    tmp_path: Path, calls: int
) -> None:
    (line,) = run(tmp_path, "SIGSTOP", calls)
    said = "W&B does not answer" if calls > 1000 else "W&B is off: it has not ended within 2 s"
    assert line.startswith(said)
    assert steps(tmp_path) == list(range(calls))


@pytest.mark.slow
def test_a_process_of_wandb_that_does_not_start_costs_a_line_and_seconds(tmp_path: Path) -> None:
    core = tmp_path / "wandb-core"
    core.write_text("#!/bin/sh\nwhile true; do sleep 1; done\n")
    core.chmod(0o755)
    (line,) = run(tmp_path, "hang", CORE=str(core))
    assert line.startswith("W&B is off: it has not ended within 2 s")


@pytest.mark.slow
def test_slurms_warning_to_all_processes_of_a_job_does_not_end_that_of_wandb(
    tmp_path: Path,
) -> None:
    assert run(tmp_path, "SIGUSR1", LAST_S="60") == []
