"""Real processes: whether they run, and that they end with their parent."""

import dataclasses
import os
import select
import signal
import subprocess
import sys

import pytest

from taming_dist.processes import birth_of, this_process

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and prctl")


def test_this_process_runs() -> None:
    assert this_process().is_here
    assert this_process().is_running


def test_a_process_that_has_ended_does_not_run_even_before_anybody_has_asked_for_its_status() -> (
    None
):
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    here = dataclasses.replace(this_process(), pid=child.pid, birth=birth_of(child.pid))
    assert here.is_running
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert not here.is_running
    child.communicate()
    assert not here.is_running


@LINUX
def test_a_process_with_the_number_of_an_earlier_one_is_another() -> None:
    here = this_process()
    *realm, ticks = here.birth.split(" ")
    earlier = dataclasses.replace(here, birth=" ".join([*realm, str(int(ticks) - 1)]))
    assert earlier.is_here
    assert not earlier.is_running


@LINUX
@pytest.mark.parametrize("other", [{"host": "elsewhere"}, {"birth": "another-boot pid:[1] 5"}])
def test_a_process_of_another_host_or_container_is_not_here(other: dict[str, str]) -> None:
    foreign = dataclasses.replace(this_process(), **other)
    assert not foreign.is_here
    assert not foreign.is_running


CHILD = """
import signal, sys
from taming_dist.processes import end_with_parent
end_with_parent(signal.SIGTERM)
print("ready", flush=True)
signal.pause()
"""
PARENT = f"""
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", {CHILD!r}])
child.wait()
"""


@LINUX
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGUSR1])
def test_a_process_ends_with_its_parent_however_that_ends(number: signal.Signals) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    assert parent.stdout.readline() == b"ready\n"
    parent.send_signal(number)
    assert parent.wait(60) == -number
    # the child has the other end of the pipe: it closes when that is gone as well
    assert select.select([parent.stdout], [], [], 60)[0]
    assert parent.stdout.read() == b""
