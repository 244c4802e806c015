"""Signals in this very process."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from taming_dist.launch import STOP_SIGNALS
from taming_dist.training.signals import Repeated, StopRequest

LAUNCHED = ("TORCHELASTIC_RUN_ID", "SLURM_PROCID", "SLURM_STEP_ID")


@pytest.fixture
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    signal.set_wakeup_fd(-1)
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def stop(handlers: None) -> StopRequest:
    return StopRequest().install()


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_is_remembered_and_nothing_else_happens(
    stop: StopRequest, number: signal.Signals
) -> None:
    assert not stop.asked
    os.kill(os.getpid(), number)
    assert stop.asked
    assert stop.name == number.name


STUCK = """
import ctypes, sys, threading
from taming_dist.training.signals import StopRequest
stop = StopRequest().install()
stop.last_words = lambda reason: print(reason, flush=True)
print("ready", flush=True)
wait = threading.Event().wait
if sys.argv[1] == "c":
    mutex = ctypes.create_string_buffer(64)
    ctypes.CDLL(None).pthread_mutex_lock(mutex)
    wait = lambda: ctypes.CDLL(None).pthread_mutex_lock(mutex)  # for ever
wait()
"""


@pytest.mark.parametrize("place", ["python", "c"])
def test_a_second_ctrl_c_ends_the_process_at_once_wherever_it_is(place: str) -> None:
    """In C as well, where no handler in Python would ever run: in a collective, say."""
    environment = {name: value for name, value in os.environ.items() if name not in LAUNCHED}
    command = [sys.executable, "-c", STUCK, place]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        deadline = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < deadline:
            process.send_signal(signal.SIGINT)  # two that come together may count as one
            time.sleep(0.05)
        assert process.stdout.read() == "a second SIGINT\n"
    assert process.returncode == 130


def test_signals_that_launchers_repeat_count_once(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)
    alone = Repeated()
    assert [alone(signal.SIGINT, at) for at in (0.0, 0.1)] == [False, True]
    assert [alone(signal.SIGTERM, at) for at in (0.0, 0.1, 5.0)] == [False, False, True]
    assert not any(alone(signal.SIGUSR1, at) or alone(signal.SIGHUP, at) for at in (0.0, 9.0))

    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a")
    ranks = Repeated()
    assert [ranks(signal.SIGINT, at) for at in (0.0, 0.1, 5.0)] == [False, False, True]

    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    assert not any(Repeated()(signal.SIGTERM, at) for at in (0.0, 30.0))


def test_nohup_has_the_end_of_the_terminal_ignored_and_it_stays_so(handlers: None) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    stop = StopRequest().install()
    with stop.suspended():
        os.kill(os.getpid(), signal.SIGHUP)
    os.kill(os.getpid(), signal.SIGHUP)
    assert not stop.asked


def test_the_end_after_the_warning_does_not_cut_the_saving_short(stop: StopRequest) -> None:
    os.kill(os.getpid(), signal.SIGUSR1)
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop.name == "SIGUSR1"


def test_ranks_that_wait_to_meet_end_at_once_and_remember_signals_before_and_after(
    stop: StopRequest,
) -> None:
    handlers = [signal.getsignal(number) for number in STOP_SIGNALS]
    with stop.suspended():
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
        assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
        os.kill(os.getpid(), signal.SIGUSR1)  # Slurm's warning of the time limit can wait
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == handlers
    assert stop.name == "SIGUSR1"
