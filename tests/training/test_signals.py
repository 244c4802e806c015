"""Signals in this very process."""

import os
import signal
from collections.abc import Iterator

import pytest

from taming_dist.launch import STOP_SIGNALS
from taming_dist.training.signals import StopRequest


@pytest.fixture
def stop() -> Iterator[StopRequest]:
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield StopRequest().install()
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_is_remembered_and_nothing_else_happens(
    stop: StopRequest, number: signal.Signals
) -> None:
    assert not stop.asked
    os.kill(os.getpid(), number)
    assert stop.asked
    assert stop.name == number.name


def test_a_second_ctrl_c_ends_the_process(stop: StopRequest) -> None:
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(SystemExit) as ending:
        os.kill(os.getpid(), signal.SIGINT)
    assert ending.value.code == 130


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
