"""When a codebook counts as collapsed."""

from taming_dist.training.collapse import GOING, PERPLEXITY, USAGE, CollapseAlarm


def told(*points: tuple[int, float, float]) -> list[int]:
    """The steps at which something is said of log points (step, perplexity, usage)."""
    alarm = CollapseAlarm()
    return [
        step
        for step, perplexity, usage in points
        if alarm.look(step, {PERPLEXITY: perplexity, USAGE: usage})
    ]


def test_a_fall_to_a_tenth_of_the_perplexity_is_told_once() -> None:
    healthy = [(step, 500.0, 0.9) for step in range(0, 300, 50)]
    low = [(step, 30.0, 0.1) for step in range(300, 600, 50)]
    assert told(*healthy, *low) == [350]


def test_a_fall_that_follows_a_recovery_is_told_again() -> None:
    points = [(0, 500.0, 0.9), (50, 9.0, 0.1), (100, 9.0, 0.1)]
    again = [(150, 400.0, 0.8), (200, 9.0, 0.1), (250, 9.0, 0.1)]
    assert told(*points, *again) == [100, 250]


def test_one_log_point_of_few_images_is_no_collapse() -> None:
    assert told((0, 500.0, 0.9), (50, 9.0, 0.1), (100, 480.0, 0.9), (150, 9.0, 0.1)) == []


def test_a_codebook_that_never_came_to_life_is_told_once_training_has_got_going() -> None:
    points = [(step, 9.0, 0.01) for step in range(0, GOING + 200, 50)]
    assert told(*points) == [GOING + 50]


def test_models_without_codes_and_windows_without_images_say_nothing() -> None:
    alarm = CollapseAlarm()
    assert alarm.look(2000, {"train/loss": 1.0}) is None
    assert alarm.look(2000, {PERPLEXITY: float("nan"), USAGE: float("nan")}) is None


def test_the_line_names_the_step_and_the_figures() -> None:
    alarm = CollapseAlarm()
    alarm.look(0, {PERPLEXITY: 500.0, USAGE: 0.9})
    alarm.look(50, {PERPLEXITY: 9.0, USAGE: 0.1})
    line = alarm.look(100, {PERPLEXITY: 9.0, USAGE: 0.1})
    assert line is not None
    assert line.startswith(
        "step 100: the codebook collapses: 10.0% of its codes are used, perplexity 9 (highest 500)"
    )
