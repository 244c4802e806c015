import subprocess
import sys

import pytest

FAULTS = """
import resource
from taming_dist.memory import keep_freed_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

{before}
for number in range(10):
    if number == 5:
        start = faults()
    b"x" * (40 * 2**20)  # freed at once
print((faults() - start) / 5)
"""
KEPT = """
import threading
import numpy as np
from taming_dist.memory import keep_freed_memory

keep_freed_memory(one_heap={one_heap})
held, hold, done = [], threading.Event(), threading.Event()

def make():
    held.extend(np.ones(2**15, np.uint8) for _ in range(1000))
    hold.set()
    done.wait()  # a thread that ended would leave its heap to the next one

def resident_mb():
    status = open("/proc/self/status").read()
    return int(status.partition("VmRSS:")[2].split()[0]) / 1024

for _ in range(6):  # six threads have 32 MB each, one after the other
    hold.clear()
    threading.Thread(target=make, daemon=True).start()
    hold.wait()
    if _ == 0:
        start = resident_mb()
    held.clear()
print(resident_mb() - start)
"""


def printed(code: str) -> float:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return float(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
def test_freed_arrays_leave_their_pages_to_the_next_ones() -> None:
    assert printed(FAULTS.format(before="")) > 1000
    assert printed(FAULTS.format(before="keep_freed_memory()")) < 10


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
def test_in_one_heap_a_thread_uses_what_another_has_freed() -> None:
    assert printed(KEPT.format(one_heap=False)) > 100
    assert printed(KEPT.format(one_heap=True)) < 40


COLLECTED = """
import gc, weakref
from taming_dist.memory import collect_from_now_on, start_without_collecting

class Ring:
    def __init__(self):
        self.own = self

def dropped():
    return weakref.ref(Ring())

start_without_collecting()
early, stays = dropped(), [object() for _ in range(100_000)]
rings = [dropped() for _ in range(10_000)]
print(early() is not None)
collect_from_now_on()
print(early() is None, gc.get_freeze_count() > 0)
rings = [dropped() for _ in range(10_000)]
print(sum(ring() is not None for ring in rings) < 5_000)
"""


def test_garbage_is_collected_once_training_begins_and_not_while_it_starts() -> None:
    command = [sys.executable, "-c", COLLECTED]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True"] * 4
