"""Time as images seen."""

from taming_dist.training.clock import Clock


def test_steps_follow_from_images() -> None:
    clock = Clock(global_batch=6, total_steps=3)
    seen = []
    while not clock.finished:
        clock.tick()
        seen.append((clock.step, clock.images))
    assert seen == [(1, 6), (2, 12), (3, 18)]
    assert clock.total_images == 18


def test_cadences_come_due_at_multiples_and_never_when_off() -> None:
    due = [Clock(4, 10, images=4 * step).due(3) for step in range(1, 8)]
    assert due == [False, False, True, False, False, True, False]
    assert not any(Clock(4, 10, images=4 * step).due(0) for step in range(1, 8))


def test_a_longer_run_goes_on_from_a_finished_one() -> None:
    assert Clock(4, 5, images=20).finished
    assert not Clock(4, 6, images=20).finished
