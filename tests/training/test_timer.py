"""What a log point says of a run's speed, on a clock of the test's own."""

import time

import pytest

from taming_dist.engine.peak import Peak
from taming_dist.training.clock import Clock
from taming_dist.training.console import left
from taming_dist.training.timer import Timer
from taming_dist.training.workload import Speed, Workload

SPEED = Speed(Workload({"first": 300, "later": 100}, lambda step: ["first", "later"][: step + 1]),
              Peak(50.0, known=True), devices=2)  # fmt: skip


class Wall:
    """A clock that stands still."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def wall(monkeypatch: pytest.MonkeyPatch) -> Wall:
    wall = Wall()
    monkeypatch.setattr(time, "perf_counter", wall)
    return wall


def step(timer: Timer, wall: Wall, clock: Clock, wait: float, work: float) -> None:
    with timer.waiting():
        wall.now += wait
    wall.now += work
    clock.tick()
    timer.count(clock)


def test_utilization_is_of_what_ran_in_each_step_and_of_all_time_between_log_points(
    wall: Wall,
) -> None:
    timer, clock = Timer(SPEED), Clock(global_batch=4, total_steps=100)
    step(timer, wall, clock, wait=2.0, work=6.0)  # 4 images of 300 FLOPs
    step(timer, wall, clock, wait=0.0, work=8.0)  # 4 images of 400
    assert timer.waited == 2 / 16
    found = timer.take(clock)
    assert found["images_per_s"] == 8 / 16
    assert found["mfu"] == (4 * 300 + 4 * 400) / (16 * 2 * 50)
    assert found["data_wait_fraction"] == 2 / 16
    timer.restart()
    step(timer, wall, clock, wait=0.0, work=1.0)
    assert timer.take(clock)["mfu"] == 4 * 400 / (1 * 2 * 50)
    other = Timer()
    step(other, wall, clock, wait=0.0, work=1.0)
    assert "mfu" not in other.take(clock)


def test_what_is_left_goes_by_all_time_since_the_first_log_point_but_not_by_what_was_before(
    wall: Wall,
) -> None:
    timer, clock = Timer(), Clock(global_batch=4, total_steps=10)
    step(timer, wall, clock, wait=0.0, work=90.0)  # it compiles
    assert timer.take(clock)["time_left_s"] == 9 * 90
    timer.restart()
    for _ in range(3):
        step(timer, wall, clock, wait=1.0, work=4.0)
        wall.now += 5.0  # a validation
        timer.restart()
    step(timer, wall, clock, wait=0.0, work=10.0)
    assert timer.take(clock)["time_left_s"] == 5 * 10


def test_a_log_point_without_a_step_since_the_last_says_that_nothing_is_left_to_tell(
    wall: Wall,
) -> None:
    timer = Timer()
    wall.now += 1.0
    assert timer.take(Clock(4, 10, images=40))["time_left_s"] == 0


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (None, ""),
        (4.4, ", 4.4 s left"),
        (60.0, ", 1 min 00 s left"),
        (3590.0, ", 59 min 50 s left"),
        (7500.0, ", 2 h 05 min left"),
    ],
)
def test_the_time_that_is_left_is_readable(seconds: float | None, text: str) -> None:
    assert left(seconds) == text
