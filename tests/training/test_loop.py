"""The loop on a recipe that only counts: what happens when, how a run ends and goes on."""

import dataclasses
import json
import math
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from taming_dist.data.plan import Plan
from taming_dist.engine.checkpoint import Checkpoints
from taming_dist.engine.draft import Draft, GivenUp, SaveFailed
from taming_dist.engine.meta import read_meta, write_meta
from taming_dist.engine.snapshot import Snapshot
from taming_dist.engine.world import World
from taming_dist.errors import Diverged, UserError
from taming_dist.training.best import Best, Criterion
from taming_dist.training.clock import Clock
from taming_dist.training.console import Console
from taming_dist.training.goodput import GOODPUT, RUNNING, lines, read_past
from taming_dist.training.loop import fit
from taming_dist.training.recipe import Preview
from taming_dist.training.run import Data, LoopConfig, Run
from taming_dist.training.signals import StopRequest
from taming_dist.training.sinks import MetricsFile, Sinks
from taming_dist.training.skips import MOST_SKIPPED
from taming_dist.training.stopping import Stopping
from taming_dist.training.validation import in_step, make_up

ALONE = World(0, 1, 0, torch.device("cpu"))
OFF = {"log_every": 0, "checkpoint_every": 0, "validate_every": 0, "preview_every": 0}


class Numbers:
    """A source whose batches are the positions of their samples: micro-batches of two."""

    plan = Plan(np.array([5]), "fingerprint", 7, 1, 1, 0, 1, 2)

    def batches(self, from_sample: int) -> Iterator[list[int]]:
        position = from_sample
        while True:
            yield [position, position + 1]
            position += 2

    def epoch_batches(self) -> Iterator[list[int]]:
        yield from ([0, 1], [2, 3], [4])

    def keys(self, batch: list[int]) -> list[str]:
        return [f"key-{position}" for position in batch]

    def counts(self) -> dict[str, int]:
        return {"bad_samples": 3}


class Weights:
    """An engine whose only weight is a number."""

    def __init__(self) -> None:
        self.value = 0.0
        self.not_finite: str | None = None
        self.difference: str | None = None
        self.moved, self.spiked = torch.tensor(True), torch.tensor(False)

    def skip(self, skipped: bool) -> None:
        """What an engine remembers of an optimizer step."""
        self.moved = torch.tensor(not skipped)

    def snapshot(self) -> Snapshot:
        return Snapshot([], {"value": self.value}, 0, 1, self.not_finite, self.difference)

    def load(self, folder: Path, name: str) -> None:
        self.value = json.loads((folder / name / "state.json").read_text())["value"]


@dataclasses.dataclass(frozen=True)
class Exported:
    """What a recipe exports: its value, in every file that an export has."""

    value: str
    step: int
    dies_at: str
    described = {"kind": "value"}

    def write(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        for name in ("config.json", "model.safetensors", "value"):
            (folder / name).write_text(self.value)
        if self.dies_at == f"{self.step} {folder.name}":
            raise KeyboardInterrupt


class Counter:
    """A recipe whose loss is the sum of the positions seen; it notes every call."""

    def __init__(self, on_step: Callable[[Clock], None] = lambda clock: None) -> None:
        self.weights = Weights()
        self.engines = {"only": self.weights}
        self.calls: list[str] = []
        self.seen: list[int] = []
        self.remembered = 0
        self.dies_at = ""  # after which step and export
        self.on_step = on_step
        self.spoils: Callable[[int], float | None] = lambda position: None
        self.measured: dict[int, float] = {}  # by step, what validation gives beside its count

    def train_step(self, micro_batches: Iterable[Any], clock: Clock) -> Iterator[dict[str, Tensor]]:
        before, skipped = self.weights.value, False
        for batch in micro_batches:
            self.seen += batch
            self.weights.value += sum(batch)
            spoilt = self.spoils(batch[0])
            skipped |= spoilt is not None
            yield {"loss": torch.tensor(self.weights.value if spoilt is None else spoilt)}
        if skipped:
            self.weights.value = before
        self.weights.skip(skipped)
        self.remembered = clock.step + 1
        self.on_step(clock)

    def depends_on_the_cut(self) -> str | None:
        return "the draw of each rank"

    def window_metrics(self) -> dict[str, float]:
        return {"lr": 1.0}

    def validate(self, batches: Iterable[tuple[Any, bool]]) -> dict[str, float]:
        self.calls.append("validate")
        found = {"count": float(sum(len(batch) for batch, counts in batches if counts))}
        if self.measured:
            found["measured"] = self.measured[self.remembered]
        return found

    def pictures(self, batches: Iterable[tuple[Any, bool]]) -> Iterator[int]:
        self.calls.append("pictures")
        yield from (len(batch) for batch, counts in batches if counts)

    def preview(self, batch: Any) -> Preview | None:
        self.calls.append(f"preview {batch}")
        return Preview(torch.zeros(3, 2, 2, dtype=torch.uint8), ("nothing",))

    def state_dict(self) -> dict[str, Any]:
        return {"remembered": self.remembered}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.remembered = state["remembered"]

    def export(self) -> Any:
        self.calls.append("export")
        return Exported(str(self.weights.value), self.remembered, self.dies_at)


def run(
    folder: Path,
    recipe: Counter,
    steps: int,
    stop: StopRequest | None = None,
    batch: int = 4,
    **config: Any,
) -> bool:
    """Train with two micro-batches of two to a step; whether there was nothing left to do."""
    whole = made(folder, recipe, Clock(batch, steps), **config)
    return fit(whole, stop or StopRequest()).finished


def made(folder: Path, recipe: Counter, clock: Clock, **config: Any) -> Run:
    """A run whose best model is that of the lowest val/count."""
    accumulation = clock.global_batch // 2
    return Run(
        recipe,
        Data(Numbers(), Numbers(), val_batches=4, preview="shown", accumulation=accumulation),
        clock,
        LoopConfig(**OFF | config),
        Checkpoints(folder / "checkpoints", ALONE, keep_last=100),
        Sinks(folder, [MetricsFile(folder), Console(clock, "run")]),
        ALONE,
        folder,
        Criterion("val/measured") if recipe.measured else None,
    )


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what a clock on the wall decides."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {
            name: value
            for name, value in line.items()
            if name != "time" and not name.startswith("throughput/")
        }
        for line in lines
    ]


def event_lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def trained(folder: Path) -> list[int]:
    """The images seen of each line on training."""
    return [line["samples"] for line in metrics(folder) if "train/loss" in line]


def events(folder: Path) -> list[tuple[str, int]]:
    return [(line["event"], line["step"]) for line in event_lines(folder)]


def test_every_cadence_comes_when_it_is_due_and_at_the_end(tmp_path: Path) -> None:
    recipe = Counter()
    assert run(tmp_path, recipe, 7, log_every=2, checkpoint_every=3, validate_every=4)
    assert [line["step"] for line in metrics(tmp_path)] == [2, 3, 4, 4, 6, 7, 7]
    assert [line["step"] for line in metrics(tmp_path) if "val/count" in line] == [4, 7]
    assert events(tmp_path) == [("start", 0), ("save", 3), ("save", 6), ("save", 7)]
    assert recipe.calls.count("preview shown") == 1
    assert (tmp_path / "images" / "images-000000000028.png").is_file()
    assert (tmp_path / "export" / "value").read_text() == str(recipe.weights.value)


def test_every_image_is_seen_once_in_order_and_logged_means_cover_all_steps(
    tmp_path: Path,
) -> None:
    recipe = Counter()
    run(tmp_path, recipe, 6, log_every=3)
    assert recipe.seen == list(range(24))
    sums = [sum(range(2 * n + 2)) for n in range(12)]  # the loss of every micro-batch
    expected = [sum(sums[:6]) / 6, sum(sums[6:]) / 6]
    losses = [line["train/loss"] for line in metrics(tmp_path) if "train/loss" in line]
    assert losses == pytest.approx(expected)
    assert trained(tmp_path) == [12, 24]
    line = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert line["throughput/images_per_s"] > 0
    assert 0 <= line["throughput/data_wait_fraction"] <= 1


def test_a_resumed_run_reads_as_one_that_never_stopped(tmp_path: Path) -> None:
    whole, first, second = tmp_path / "whole", tmp_path / "parts", tmp_path / "parts"
    for folder in (whole, first):
        folder.mkdir()
    cadence = {"log_every": 1, "checkpoint_every": 2, "validate_every": 2}
    run(whole, Counter(), 6, **cadence)
    run(first, Counter(), 4, **cadence)
    again = Counter()
    assert run(second, again, 6, **cadence)
    assert again.seen == list(range(16, 24))
    assert again.remembered == 6
    assert metrics(second) == metrics(whole)
    assert events(second)[3:] == [("resume", 4), ("save", 6)]


def test_each_start_tells_what_it_trains_with(tmp_path: Path) -> None:
    for steps in (2, 4):
        run(tmp_path, Counter(), steps, checkpoint_every=2)
    lines = map(json.loads, (tmp_path / "events.jsonl").read_text().splitlines())
    told = [
        (line["event"], line["ranks"], line["device"], line["global_batch"])
        for line in lines
        if line["event"] in ("start", "resume")
    ]
    assert told == [("start", 1, "CPU", 4), ("resume", 1, "CPU", 4)]


def test_what_a_dead_run_logged_after_its_checkpoint_did_not_happen(tmp_path: Path) -> None:
    def dies(clock: Clock) -> None:
        if clock.step == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Counter(dies), 8, log_every=1, checkpoint_every=3)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "train/lo')  # torn by the crash
    run(tmp_path, Counter(), 8, log_every=1, checkpoint_every=3)
    assert trained(tmp_path) == [4 * step for step in range(1, 9)]


def test_a_run_that_died_before_its_first_checkpoint_starts_its_metrics_anew(
    tmp_path: Path,
) -> None:
    def dies(clock: Clock) -> None:
        if clock.step == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Counter(dies), 4, log_every=1)
    assert trained(tmp_path) == [4, 8]
    run(tmp_path, Counter(), 4, log_every=1)
    assert trained(tmp_path) == [4, 8, 12, 16]


def test_a_signal_saves_at_the_end_of_the_step_and_the_run_goes_on_there(tmp_path: Path) -> None:
    stop = StopRequest()

    def asks(clock: Clock) -> None:
        if clock.step == 2:
            stop.name = "SIGTERM"

    assert not run(tmp_path, Counter(asks), 6, stop, log_every=2)
    assert events(tmp_path) == [("start", 0), ("save", 3), ("signal", 3)]
    assert [line["step"] for line in metrics(tmp_path)] == [2, 3]
    again = Counter()
    assert run(tmp_path, again, 6)
    assert again.seen == list(range(12, 24))


VALIDATED = {"log_every": 1, "checkpoint_every": 2, "validate_every": 2}


@pytest.fixture
def undisturbed(tmp_path: Path) -> list[dict[str, Any]]:
    """The metrics of six steps, validated after every other."""
    (tmp_path / "undisturbed").mkdir()
    run(tmp_path / "undisturbed", Counter(), 6, **VALIDATED)
    return metrics(tmp_path / "undisturbed")


@pytest.mark.parametrize("step", [2, 4, 6])
def test_a_run_killed_while_it_validates_has_saved_and_validates_that_step_first(
    tmp_path: Path, undisturbed: list[dict[str, Any]], step: int
) -> None:
    killed = Counter()

    def dies(batches: Iterable[tuple[Any, bool]]) -> dict[str, float]:
        if killed.remembered == step:
            next(iter(batches))
            raise KeyboardInterrupt
        return Counter.validate(killed, batches)

    killed.validate = dies  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, killed, 6, **VALIDATED)
    assert events(tmp_path)[-1] == ("save", step)
    again = Counter()
    assert run(tmp_path, again, 6, **VALIDATED)
    assert again.seen == list(range(4 * step, 24))
    assert again.calls[0] == "validate"
    assert metrics(tmp_path) == undisturbed


def test_a_run_asked_to_stop_validates_at_its_next_start(
    tmp_path: Path, undisturbed: list[dict[str, Any]]
) -> None:
    stop = StopRequest()

    def asks(clock: Clock) -> None:
        if clock.step == 3:
            stop.name = "SIGTERM"

    stopped = Counter(asks)
    assert not run(tmp_path, stopped, 6, stop, **VALIDATED)
    assert stopped.calls.count("validate") == 1  # after step 2; after 4 there is no time for it
    assert run(tmp_path, Counter(), 6, **VALIDATED)
    assert metrics(tmp_path) == undisturbed


@pytest.mark.parametrize("step", [2, 3, 6])
def test_a_signal_in_the_middle_of_a_validation_ends_it_and_the_next_start_makes_it_all(
    tmp_path: Path, undisturbed: list[dict[str, Any]], step: int
) -> None:
    cadence = {"log_every": 1, "checkpoint_every": 2, "validate_every": 2 if step != 3 else 3}
    whole = undisturbed
    if step == 3:  # a step after which no checkpoint is due
        (tmp_path / "three").mkdir()
        run(tmp_path / "three", Counter(), 6, **cadence)
        whole = metrics(tmp_path / "three")
    stop, asked, measured = StopRequest(), Counter(), []

    def validate(batches: Iterable[tuple[Any, bool]]) -> dict[str, float]:
        for number, batch in enumerate(batches):
            measured.append(batch)
            if asked.remembered == step and number == 1:
                stop.name = "SIGTERM"
                measured.clear()
        return {"count": 5.0}

    asked.validate = validate  # type: ignore[method-assign]
    assert not run(tmp_path, asked, 6, stop, **cadence)
    assert measured == []  # no batch after the signal
    assert events(tmp_path)[-2:] == [("save", step), ("signal", step)]
    assert not [line for line in metrics(tmp_path) if line["step"] == step and "val/count" in line]
    again = Counter()
    assert run(tmp_path, again, 6, **cadence)
    assert again.calls[0] == "validate"
    assert metrics(tmp_path) == whole


def test_a_start_that_is_asked_to_stop_while_it_makes_up_for_a_validation_makes_a_step(
    tmp_path: Path,
) -> None:
    stop = StopRequest()
    stop.name = "SIGTERM"
    folder = tmp_path / "run"
    folder.mkdir()
    for step in (1, 2, 3):
        assert not run(folder, Counter(), 6, stop, checkpoint_every=1, validate_every=1)
        assert events(folder)[-1] == ("signal", step)


class Pictured:
    """What measures the pictures of a Counter: their number; it can die at it."""

    def __init__(self, dies: bool = False) -> None:
        self.dies = dies

    def measure(self, pictures: Iterable[int], world: World, progress: Any) -> dict[str, float]:
        if self.dies:
            raise KeyboardInterrupt
        return {"pictured": float(sum(pictures))}


def evaluated(folder: Path, recipe: Counter, distances: Pictured) -> Run:
    """A run of six steps, validated after every other and evaluated after every third."""
    whole = made(folder, recipe, Clock(4, 6), **VALIDATED, evaluate_every=3)
    criterion = Criterion("eval/pictured", higher=True)
    return dataclasses.replace(whole, distances=distances, criterion=criterion)


def test_evaluation_has_a_cadence_of_its_own_and_can_choose_the_best_model(tmp_path: Path) -> None:
    fit(evaluated(tmp_path, Counter(), Pictured()), StopRequest())
    found = {
        group: [line["step"] for line in metrics(tmp_path) if name in line]
        for group, name in (("val", "val/count"), ("eval", "eval/pictured"))
    }
    assert found == {"val": [2, 4, 6], "eval": [3, 6]}
    assert all(line.get("eval/pictured", 5) == 5 for line in metrics(tmp_path))
    assert [line["step"] for line in event_lines(tmp_path) if line["event"] == "best"] == [3]


def test_a_run_killed_while_it_evaluates_makes_up_for_that_and_not_for_its_validation(
    tmp_path: Path,
) -> None:
    (tmp_path / "whole").mkdir()
    fit(evaluated(tmp_path / "whole", Counter(), Pictured()), StopRequest())
    (tmp_path / "parts").mkdir()
    fit(made(tmp_path / "parts", Counter(), Clock(4, 5), **VALIDATED), StopRequest())
    with pytest.raises(KeyboardInterrupt):
        fit(evaluated(tmp_path / "parts", Counter(), Pictured(dies=True)), StopRequest())
    again = Counter()
    fit(evaluated(tmp_path / "parts", again, Pictured()), StopRequest())
    assert "validate" not in again.calls
    assert "pictures" in again.calls
    last = {name: metrics(tmp_path / name)[-1] for name in ("parts", "whole")}
    assert last["parts"] == last["whole"]


def test_what_was_validated_is_not_validated_again(tmp_path: Path) -> None:
    run(tmp_path, Counter(), 4, **VALIDATED)
    again = Counter()
    run(tmp_path, again, 6, **VALIDATED)
    assert again.calls == ["export", "preview shown", "validate"]


def test_every_rank_validates_where_the_first_finds_nothing_logged(tmp_path: Path) -> None:
    run(tmp_path, Counter(), 4, **VALIDATED)

    @dataclasses.dataclass(frozen=True)
    class Second(World):
        """A rank that is told by the first what that has found."""

        told: dict[str, float] | None = None

        def broadcast(self, value: Any) -> Any:
            assert value is None  # it has no files of its own
            return self.told

    for told, expected in (({"count": 5.0}, []), (None, ["validate"])):
        world = Second(1, 1, 1, torch.device("cpu"), told)
        recipe = Counter()
        whole = made(tmp_path, recipe, Clock(4, 4, images=16), validate_every=4)
        second = dataclasses.replace(whole, world=world, sinks=Sinks(None, []))
        make_up(second, Best(), Stopping(StopRequest(), world))
        assert recipe.calls == expected


def test_a_finished_run_started_again_does_nothing(tmp_path: Path) -> None:
    run(tmp_path, Counter(), 3, log_every=1)
    before = metrics(tmp_path)
    again = Counter()
    assert run(tmp_path, again, 3, log_every=1)
    assert again.seen == []
    assert again.calls == []
    assert metrics(tmp_path) == before


def test_a_run_killed_before_its_last_checkpoint_has_exported_already(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise the next start would find the run finished and never export."""

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    recipe = Counter()
    monkeypatch.setattr("taming_dist.engine.checkpoint.write_meta", killed)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, recipe, 3)
    assert (tmp_path / "export" / "value").is_file()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_skipped_step_is_counted_and_told_with_its_samples_but_not_in_the_means(
    tmp_path: Path, value: float
) -> None:
    recipe = Counter()
    recipe.spoils = lambda position: value if position == 10 else None
    assert run(tmp_path, recipe, 4, log_every=4)
    skips = [line for line in event_lines(tmp_path) if line["event"] == "skip"]
    assert [(line["step"], line["samples"]) for line in skips] == [(3, 12)]
    assert (skips[0]["networks"], skips[0]["cause"]) == (["only"], "loss")
    assert skips[0]["keys"] == ["key-10", "key-11"]
    followed = [1, 6, 15, 28, 53, 82]  # sums of positions; the third step's were taken back
    assert metrics(tmp_path)[0]["train/loss"] == pytest.approx(sum(followed) / len(followed))


def test_a_skipped_step_is_told_one_step_later_or_at_the_log_point_before(tmp_path: Path) -> None:
    told: list[list[int]] = []

    def looks(clock: Clock) -> None:
        recipe.weights.skip(clock.step + 1 in (2, 4))
        lines = event_lines(tmp_path)
        told.append([line["step"] for line in lines if line["event"] == "skip"])

    recipe = Counter(looks)
    assert run(tmp_path, recipe, 6, log_every=4)
    assert told == [[], [], [], [2], [2, 4], [2, 4]]  # at the end of steps 0 to 5


def test_a_step_skipped_for_its_gradient_is_told_with_all_its_samples(tmp_path: Path) -> None:
    recipe = Counter()
    recipe.on_step = lambda clock: recipe.weights.skip(clock.step == 1)
    assert run(tmp_path, recipe, 3)
    (skip,) = [line for line in event_lines(tmp_path) if line["event"] == "skip"]
    assert (skip["step"], skip["cause"]) == (2, "gradient")
    assert skip["keys"] == ["key-4", "key-5", "key-6", "key-7"]


def test_a_step_skipped_for_a_spike_is_told_as_one_with_all_its_samples(tmp_path: Path) -> None:
    def spike(clock: Clock) -> None:
        recipe.weights.skip(clock.step == 1)
        recipe.weights.spiked = torch.tensor(clock.step == 1)

    recipe = Counter(spike)
    assert run(tmp_path, recipe, 3)
    (skip,) = [line for line in event_lines(tmp_path) if line["event"] == "skip"]
    assert (skip["step"], skip["cause"], len(skip["keys"])) == (2, "spike", 4)


def test_a_run_that_only_skips_steps_ends_and_one_that_skips_some_does_not(
    tmp_path: Path,
) -> None:
    recipe = Counter()
    last_of_row = 4 * (MOST_SKIPPED + 1)
    recipe.spoils = lambda position: math.nan if 8 <= position < last_of_row else None
    assert run(tmp_path, recipe, MOST_SKIPPED + 3)
    again = Counter()
    again.spoils = lambda position: math.nan if 4 <= position < last_of_row else None
    told = f"step {MOST_SKIPPED + 1}: a loss or gradient of the only was not finite in"
    with pytest.raises(Diverged, match=f"{told} {MOST_SKIPPED} steps in a row"):
        run(tmp_path / "again", again, MOST_SKIPPED + 3, checkpoint_every=1)
    saved = [step for name, step in events(tmp_path / "again") if name == "save"]
    assert saved[-1] == MOST_SKIPPED  # which holds the weights of step 1


def test_steps_with_samples_to_be_skipped_are_passed_over_and_told(tmp_path: Path) -> None:
    recipe = Counter()
    # steps 2 and 3 have samples 4 to 11, the sixth 20 to 23
    assert run(tmp_path, recipe, 6, log_every=2, skip_samples=["7-10", "23-24"])
    assert recipe.seen == [*range(4), *range(12, 20)]
    skips = [line for line in event_lines(tmp_path) if line["event"] == "skip"]
    assert [(line["step"], line["cause"]) for line in skips] == [
        (2, "train.skip_samples"),
        (3, "train.skip_samples"),
        (6, "train.skip_samples"),
    ]
    assert [line["samples"] for line in metrics(tmp_path)] == [8, 16, 24, 24]


def test_a_run_resumes_the_same_in_the_middle_of_samples_to_be_skipped(tmp_path: Path) -> None:
    cadence = {"log_every": 1, "checkpoint_every": 1, "skip_samples": ["4-16"]}
    run(tmp_path / "whole", Counter(), 6, **cadence)
    run(tmp_path / "parts", Counter(), 3, **cadence)
    again = Counter()
    assert run(tmp_path / "parts", again, 6, **cadence)
    assert again.seen == list(range(16, 24))
    assert [line for line in metrics(tmp_path / "parts") if "train/loss" in line] == [
        line for line in metrics(tmp_path / "whole") if "train/loss" in line
    ]


@pytest.mark.parametrize("text", ["5", "7-7", "9-7", "a-b", "-5-7", "5-7,9-11", ""])
def test_a_range_of_samples_that_is_none_is_named(text: str) -> None:
    with pytest.raises(UserError, match=re.escape(f"train.skip_samples: {text!r} is not")):
        LoopConfig(skip_samples=[text])


def test_a_codebook_that_collapses_is_told_once_and_ends_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    recipe = Counter()
    window = {"codebook_usage": 0.9, "codebook_perplexity": 500.0}
    recipe.window_metrics = lambda: dict(window)  # type: ignore[method-assign]
    recipe.on_step = lambda clock: window.update(codebook_perplexity=9.0 if clock.step > 1 else 500)
    assert run(tmp_path, recipe, 6, log_every=1)
    (told,) = [line for line in event_lines(tmp_path) if line["event"] == "collapse"]
    assert told["perplexity"] == 9
    assert capsys.readouterr().out.count("the codebook collapses") == 1


def test_a_resume_on_other_ranks_says_what_changes(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run(tmp_path, Counter(), 2)
    (folder,) = (tmp_path / "checkpoints").iterdir()
    write_meta(folder, dataclasses.replace(read_meta(folder), world_size=4))
    capsys.readouterr()
    assert run(tmp_path, Counter(), 3)
    said = (
        "resumed on 1 rank, saved on 4: the samples of each step are the same, and losses but for"
    )
    assert said in capsys.readouterr().out.replace("\n", " ")


def test_another_global_batch_goes_on_where_it_divides_the_images_seen(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run(tmp_path, Counter(), 3)
    again = Counter()
    run(tmp_path, again, 4, batch=6, log_every=1)
    assert again.seen == list(range(12, 24))
    assert "was 4 and is 6: 12 images seen are step 2 of 4 now" in capsys.readouterr().out
    assert trained(tmp_path) == [12, 18, 24]
    run(tmp_path, Counter(), 4, batch=6)
    assert "data.global_batch" not in capsys.readouterr().out
    with pytest.raises(UserError, match=r"data\.global_batch=10 does not divide the 24 images"):
        run(tmp_path, Counter(), 9, batch=10)


def test_a_run_of_other_data_is_refused(tmp_path: Path) -> None:
    run(tmp_path, Counter(), 1)
    folder = tmp_path / "checkpoints" / "images-000000000004"
    meta = read_meta(folder)
    other = meta.state | {"data": meta.state["data"] | {"seed": 8}}
    write_meta(folder, dataclasses.replace(meta, state=other))
    with pytest.raises(UserError, match=r"run\.seed"):
        run(tmp_path, Counter(), 2)


def test_a_rank_with_fewer_validation_batches_repeats_the_last_without_counting_it() -> None:
    given = list(in_step(Numbers(), 5, spare=[9]))
    assert given == [([0, 1], True), ([2, 3], True), ([4], True), ([4], False), ([4], False)]


def test_a_rank_that_can_read_no_validation_sample_keeps_in_step_with_a_spare_batch() -> None:
    class Unreadable(Numbers):
        def epoch_batches(self) -> Iterator[list[int]]:
            return iter(())

    assert list(in_step(Unreadable(), 2, spare=[9])) == [([9], False), ([9], False)]


SAVED_OFTEN = {"log_every": 1, "checkpoint_every": 2}


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether the disk refuses the next checkpoints, in their order; after these none."""
    answers: list[bool] = []
    write = Checkpoints.write

    def asked(self: Checkpoints, draft: Draft, given_up: GivenUp) -> None:
        if answers and answers.pop(0):
            draft.folder.mkdir(parents=True)
            draft.abandon("")
            raise SaveFailed("its folder cannot be written (No space left): make room on its disk")
        write(self, draft, given_up)

    monkeypatch.setattr(Checkpoints, "write", asked)
    return answers


def test_a_save_that_fails_is_told_and_the_next_is_tried_when_it_is_due(
    tmp_path: Path, refused: list[bool], capsys: pytest.CaptureFixture
) -> None:
    refused += [True, True, False, True]
    assert run(tmp_path, Counter(), 10, **SAVED_OFTEN)
    told = [(name, step) for name, step in events(tmp_path) if name.startswith("save")]
    failed = [("save_failed", step) for step in (2, 4, 8)]
    assert sorted(told) == sorted([*failed, ("save", 6), ("save", 10)])
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "not saved" in line] == [
        f"checkpoint images-{4 * step:012d} was not saved: its folder cannot be written (No space "
        f"left): make room on its disk; the next one is tried when it is due ({n} of 3 failures in "
        f"a row)"
        for step, n in ((2, 1), (4, 2), (8, 1))
    ]
    assert trained(tmp_path) == [4 * step for step in range(1, 11)]
    assert not list((tmp_path / "checkpoints").glob("*.tmp"))


def test_three_failing_saves_in_a_row_end_the_run(tmp_path: Path, refused: list[bool]) -> None:
    refused += [True] * 3
    with pytest.raises(UserError, match="3 checkpoints in a row could not be saved: its folder"):
        run(tmp_path, Counter(), 20, **SAVED_OFTEN)
    assert [step for name, step in events(tmp_path) if name == "save_failed"] == [2, 4, 6]


def test_a_run_whose_last_save_fails_ends_with_an_error(
    tmp_path: Path, refused: list[bool]
) -> None:
    refused += [False, True]
    with pytest.raises(UserError, match="make room on its disk, then run the same command again"):
        run(tmp_path, Counter(), 4, **SAVED_OFTEN)
    assert run(tmp_path, Counter(), 4, **SAVED_OFTEN)
    assert trained(tmp_path) == [4, 8, 12, 16]


def test_training_goes_on_while_a_checkpoint_is_written_and_the_next_save_waits_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, goes_on, writing = Checkpoints.write, threading.Event(), threading.Lock()
    steps: list[int] = []

    def slow(self: Checkpoints, draft: Draft, given_up: GivenUp) -> None:
        with writing:  # one after the other, or this would be an error
            if draft.meta.step == 2:
                assert goes_on.wait(60)
            write(self, draft, given_up)

    def after(clock: Clock) -> None:
        steps.append(clock.step + 1)
        if clock.step + 1 == 4:  # two steps after the save that is still written
            assert ("save", 2) not in events(tmp_path)
            goes_on.set()

    monkeypatch.setattr(Checkpoints, "write", slow)
    recipe = Counter(after)
    assert run(tmp_path, recipe, 6, **SAVED_OFTEN)
    told = [line for line in event_lines(tmp_path) if line["event"] == "save"]
    assert [line["step"] for line in told] == [2, 4, 6]
    assert told[0]["duration_s"] > 0
    assert told[0]["stall_s"] > 0
    folder = tmp_path / "checkpoints" / "images-000000000008"
    weights = Weights()
    weights.load(folder, "only")
    assert weights.value == float(sum(range(8)))  # as it was when it was saved


def test_weights_that_are_not_finite_are_not_saved_and_end_the_run(tmp_path: Path) -> None:
    def spoils(clock: Clock) -> None:
        if clock.step == 3:
            recipe.weights.not_finite = "weights/value"

    recipe = Counter(spoils)
    run(tmp_path / "whole", Counter(), 2, **SAVED_OFTEN)
    with pytest.raises(Diverged) as caught:
        run(tmp_path, recipe, 6, **SAVED_OFTEN)
    assert str(caught.value) == (
        "step 4: weights/value of the only is not finite, so nothing was saved; the last good "
        "checkpoint is images-000000000008. Try a smaller optim.lr, engine.precision=fp32 or "
        "optim.clip=1"
    )
    value = (tmp_path / "export" / "value").read_text()
    assert value == (tmp_path / "whole" / "export" / "value").read_text()


def test_a_finished_run_whose_export_was_deleted_writes_it_again(tmp_path: Path) -> None:
    run(tmp_path, Counter(), 3)
    (tmp_path / "export" / "model.safetensors").unlink()
    before = (tmp_path / "export" / "value").read_text()
    again = Counter()
    assert run(tmp_path, again, 3)
    assert again.seen == []
    assert (tmp_path / "export" / "model.safetensors").read_text() == before


MEASURED = {1: 0.9, 2: 0.5, 3: 0.7, 4: math.nan, 5: 0.4, 6: 0.6, 7: 0.4, 8: 0.5}


def followed(measured: dict[int, float] = MEASURED, dies_at: str = "") -> Counter:
    """A recipe whose validation gives these; `dies_at`: after which step and export it dies."""
    recipe = Counter()
    recipe.measured, recipe.dies_at = measured, dies_at
    return recipe


def bests(folder: Path) -> list[tuple[int, float]]:
    lines = [line for line in event_lines(folder) if line["event"] == "best"]
    assert all(line["metric"] == "val/measured" for line in lines)
    return [(line["step"], line["value"]) for line in lines]


def weights_after(steps: int) -> str:
    return str(float(sum(range(4 * steps))))


def test_the_best_model_is_kept_beside_the_newest_and_told(tmp_path: Path) -> None:
    assert run(tmp_path, followed(), 8, validate_every=1, checkpoint_every=1)
    assert bests(tmp_path) == [(1, 0.9), (2, 0.5), (5, 0.4)]  # equal is not better
    assert (tmp_path / "export-best" / "value").read_text() == weights_after(5)
    assert (tmp_path / "export" / "value").read_text() == weights_after(8)


@pytest.mark.parametrize("dies_at", ["2 export-best", "5 export-best", "5 export", "6 export"])
@pytest.mark.parametrize("checkpoint_every", [2, 3])
def test_a_run_killed_between_the_best_model_and_a_checkpoint_ends_as_an_undisturbed_one(
    tmp_path: Path, dies_at: str, checkpoint_every: int
) -> None:
    cadence = {"log_every": 1, "validate_every": 1, "checkpoint_every": checkpoint_every}
    for folder in (tmp_path / "whole", tmp_path / "parts"):
        folder.mkdir()
    run(tmp_path / "whole", followed(), 8, **cadence)
    killed = followed(dies_at=dies_at)
    dies = dies_at != "5 export"
    with pytest.raises(KeyboardInterrupt) if dies else nullcontext():
        run(tmp_path / "parts", killed, 8, **cadence)
    run(tmp_path / "parts", followed(), 8, **cadence)
    assert metrics(tmp_path / "parts") == metrics(tmp_path / "whole")
    assert set(bests(tmp_path / "parts")) == set(bests(tmp_path / "whole"))
    assert (tmp_path / "parts" / "export-best" / "value").read_text() == weights_after(5)


def test_a_run_whose_model_gets_no_better_ends_with_a_reason_and_stays_ended(
    tmp_path: Path,
) -> None:
    patient = {"validate_every": 1, "checkpoint_every": 3, "patience": 2}
    end = fit(made(tmp_path, followed(), Clock(4, 100), **patient), StopRequest())
    assert end.finished
    expected = "no better val/measured in 2 validations (train.patience): best val/measured 0.5"
    assert end.reason.startswith(expected)
    assert events(tmp_path)[-1] == ("save", 4)  # though that is no multiple of 3
    again = followed()
    end = fit(made(tmp_path, again, Clock(4, 100), **patient), StopRequest())
    assert end.finished
    assert again.seen == []
    assert end.reason.startswith(expected)
    more = followed()
    assert run(tmp_path, more, 8, validate_every=1, patience=3)
    assert more.seen == list(range(16, 32))
    assert bests(tmp_path)[-1] == (5, 0.4)


def test_patience_goes_on_where_a_killed_run_had_it(tmp_path: Path) -> None:
    worse = {step: 0.5 + step for step in range(1, 9)}
    patient = {"validate_every": 1, "checkpoint_every": 2, "patience": 4}
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, followed(worse, dies_at="4 export"), 8, **patient)
    again = followed(worse)
    assert run(tmp_path, again, 8, **patient)
    assert again.seen == list(range(8, 20))  # steps 3 to 5: four validations after the first


def test_a_run_that_compares_by_another_metric_than_before_starts_to_compare_anew(
    tmp_path: Path,
) -> None:
    run(tmp_path, followed(), 3, validate_every=1)
    whole = made(tmp_path, followed(), Clock(4, 5), validate_every=1)
    fit(dataclasses.replace(whole, criterion=Criterion("val/count", True)), StopRequest())
    lines = [line for line in event_lines(tmp_path) if line["event"] == "best"]
    assert [(line["step"], line["metric"]) for line in lines[-1:]] == [(3, "val/count")]


def test_a_metric_that_validation_does_not_have_is_named(tmp_path: Path) -> None:
    whole = made(tmp_path, followed(), Clock(4, 5), validate_every=1)
    with pytest.raises(UserError, match=r"train\.best=val/psnr: .* has only val/count, val/mea"):
        fit(dataclasses.replace(whole, criterion=Criterion("val/psnr")), StopRequest())


def test_ranks_whose_weights_have_come_apart_end_the_run_and_save_nothing(tmp_path: Path) -> None:
    recipe = Counter()

    def flips(clock: Clock) -> None:
        if clock.step == 3:
            recipe.weights.difference = "weights/head on rank 3 is not what it is on the others"

    recipe.on_step = flips
    said = (
        r"step 4: the only's weights/head on rank 3 is not what it is on the others, so nothing "
        r"was saved; the last good checkpoint is images-000000000008\. The same command resumes"
    )
    with pytest.raises(Diverged, match=said):
        run(tmp_path, recipe, 6, checkpoint_every=2)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["images-000000000008"]
    assert run(tmp_path, Counter(), 6, checkpoint_every=2)


def test_time_in_steps_that_were_lost_by_a_kill_is_not_good(tmp_path: Path) -> None:
    def dies(clock: Clock) -> None:
        if clock.step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, Counter(dies), 6, log_every=1, checkpoint_every=2)
    before = list(lines(tmp_path / "metrics.jsonl"))
    kept = [line for line in before if line["samples"] <= 8 and GOODPUT in line][-1]
    past = read_past(tmp_path, images=8)
    assert past.trained_s == kept[GOODPUT] * kept[RUNNING]
    assert past.running_s == before[-1][RUNNING] > kept[RUNNING]
    with pytest.raises(KeyboardInterrupt):  # and that it ran is not forgotten by a start in vain
        run(tmp_path, Counter(dies), 6)
    assert read_past(tmp_path, images=8).running_s == past.running_s
    whole = made(tmp_path, Counter(), Clock(4, 6), log_every=1)
    end = fit(whole, StopRequest())
    assert end.goodput.restarts == 2
    assert past.trained_s < end.goodput.trained_s < end.goodput.running_s
    assert past.running_s < end.goodput.running_s <= end.goodput.since_s
    newest = [line for line in lines(tmp_path / "metrics.jsonl") if RUNNING in line][-1]
    assert past.running_s < newest[RUNNING] <= end.goodput.running_s
