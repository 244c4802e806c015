"""Checkpoints are whole or not there: broken ones, crashes at any moment, pruning, other worlds."""

import errno
import json
import math
import os
import re
import shutil
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from itertools import count
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import xxhash

from taming_dist.engine.checkpoint import Checkpoints, NotFinite
from taming_dist.engine.draft import Draft, GivenUp, SaveFailed
from taming_dist.engine.finding import all_checkpoints, find_fault, remove_unfinished
from taming_dist.engine.meta import read_meta
from taming_dist.engine.written import Written, write_file
from taming_dist.errors import UserError

TOOLS = Path(__file__).parents[2] / "tools"


class FakeSnapshot:
    """What a `FakeEngine` has at one moment: a file in a folder of its own."""

    def __init__(self, value: str, not_finite: str | None) -> None:
        self.value, self.not_finite = value, not_finite
        self.difference: str | None = None

    def write(self, folder: Path) -> dict[str, Written]:
        folder.mkdir(exist_ok=True)
        return {"weights.pt": write_file(folder / "weights.pt", [self.value.encode()])}


class FakeEngine:
    """Its only weight is a text."""

    def __init__(self, value: str = "", not_finite: str | None = None) -> None:
        self.value, self.not_finite = value, not_finite

    def snapshot(self) -> Any:
        return FakeSnapshot(self.value, self.not_finite)

    def load(self, folder: Path, name: str) -> None:
        self.value = (folder / name / "weights.pt").read_text()


def saved(checkpoints: Checkpoints, step: int, engines: Any, state: dict[str, Any]) -> Path:
    """A checkpoint, written at once."""
    draft = checkpoints.begin(step, engines, state)
    checkpoints.write(draft, GivenUp())
    return draft.final


class Alone:
    """A world of one rank; `broadcast` gives what a first rank would have sent."""

    def __init__(self, world_size: int = 1, is_first: bool = True, sent: Any = None) -> None:
        self.world_size, self.is_first, self.sent = world_size, is_first, sent
        self.rank = 0

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def barrier(self) -> None:
        pass

    def broadcast(self, value: Any) -> Any:
        return value if self.is_first else self.sent


class Killed(BaseException):
    """The process ends here."""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints"


@pytest.fixture
def checkpoints(folder: Path) -> Checkpoints:
    return Checkpoints(folder, Alone(), keep_last=10)


def save(checkpoints: Checkpoints, *steps: int) -> None:
    for step in steps:
        engines = {"generator": FakeEngine(f"G{step}"), "discriminator": FakeEngine(f"D{step}")}
        saved(checkpoints, step, engines, {"images": step * 8})


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def images(path: Path) -> int:
    return json.loads((path / "meta.json").read_text())["state"]["images"]


def silent(text: str) -> None:
    raise AssertionError(f"nothing was to be reported: {text}")


def test_a_loaded_checkpoint_gives_back_engines_and_state(checkpoints: Checkpoints) -> None:
    save(checkpoints, 3, 12)
    newest = checkpoints.latest_valid(silent)
    assert newest is not None
    assert newest.name == "images-000000000096"
    engines = {"generator": FakeEngine(), "discriminator": FakeEngine()}
    assert checkpoints.load(newest, engines) == {"images": 96}
    assert [engine.value for engine in engines.values()] == ["G12", "D12"]


def test_there_is_none_before_the_first_was_saved(checkpoints: Checkpoints) -> None:
    assert checkpoints.latest_valid(silent) is None


def test_images_are_compared_as_numbers_also_beyond_twelve_digits(
    checkpoints: Checkpoints,
) -> None:
    save(checkpoints, 124_999_999_999, 125_000_000_000)
    newest = checkpoints.latest_valid(silent)
    assert newest is not None
    assert newest.name == "images-1000000000000"


def truncate(path: Path) -> None:
    file = path / "generator" / "weights.pt"
    file.write_text(file.read_text()[:-1])


BREAKS: list[tuple[Callable[[Path], object], str]] = [
    (truncate, "generator/weights.pt has 1 bytes instead of 2"),
    (
        lambda path: (path / "discriminator" / "weights.pt").unlink(),
        "discriminator/weights.pt is missing",
    ),
    (lambda path: (path / "meta.json").unlink(), "it has no meta.json"),
    (lambda path: (path / "meta.json").write_text('{"step": 9, "fil'), "meta.json is damaged"),
    (lambda path: (path / "meta.json").write_text("{}"), "meta.json is damaged"),
    (lambda path: shutil.rmtree(path / "generator"), "generator/weights.pt is missing"),
]


@pytest.mark.parametrize(("damage", "message"), BREAKS)
def test_a_broken_newer_one_is_reported_and_skipped(
    checkpoints: Checkpoints, folder: Path, damage: Callable[[Path], object], message: str
) -> None:
    save(checkpoints, 3, 9)
    damage(folder / "images-000000000072")
    said: list[str] = []
    found = checkpoints.latest_valid(said.append)
    assert found == folder / "images-000000000024"
    assert len(said) == 1
    assert "images-000000000072" in said[0]
    assert message in said[0]


def test_an_unfinished_folder_is_ignored(checkpoints: Checkpoints, folder: Path) -> None:
    save(checkpoints, 3)
    shutil.copytree(folder / "images-000000000024", folder / "images-000000000072.tmp")
    (folder / "notes.txt").write_text("mine")
    assert checkpoints.latest_valid(silent) == folder / "images-000000000024"
    save(checkpoints, 9)  # a second attempt begins afresh
    assert find_fault(folder / "images-000000000072") is None


def test_what_dead_runs_left_is_removed_and_nothing_else(
    checkpoints: Checkpoints, folder: Path
) -> None:
    save(checkpoints, 9)
    for name in ("images-000000000080.tmp", "step-00000010.tmp", "mine.tmp"):
        (folder / name / "generator").mkdir(parents=True)
    remove_unfinished(folder)
    assert names(folder) == ["images-000000000072", "mine.tmp"]


def kill() -> None:
    raise Killed


def nth(last: int) -> Callable[[object], bool]:
    calls = count(1)
    return lambda _: next(calls) == last


@pytest.mark.parametrize("step", [3, 9], ids=["the same step again", "a later step"])
def test_a_run_killed_anywhere_while_saving_has_a_whole_checkpoint_at_every_moment(
    tmp_path: Path, step: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(TOOLS))
    from trials.cutting import Cut

    for last in range(1, 200):
        folder = tmp_path / str(last)
        checkpoints = Checkpoints(folder, Alone(), keep_last=1)
        save(checkpoints, 3)
        with monkeypatch.context() as patched:
            cut = Cut(folder, nth(last), patched.setattr, kill)
            with suppress(Killed):
                saved(checkpoints, step, {"generator": FakeEngine("new")}, {"images": 8 * step})
        found = checkpoints.latest_valid(lambda text: None)
        assert found is not None, last
        engine = FakeEngine()
        checkpoints.load(found, {"generator": engine})
        assert engine.value in ("G3", "new")
        remove_unfinished(folder)
        saved(checkpoints, step, {"generator": FakeEngine("again")}, {"images": 8 * step})
        assert names(folder) == [f"images-{8 * step:012d}"], last
        checkpoints.load(folder / names(folder)[0], {"generator": engine})
        assert engine.value == "again"
        if len(cut.calls) < last:
            break
    assert last > 20  # so many calls there are


@pytest.mark.parametrize("length", [0, 1, 200])
def test_a_save_that_the_disk_refuses_leaves_nothing_and_names_cause_and_fix(
    checkpoints: Checkpoints,
    folder: Path,
    length: int,
    largest_file: Callable[[int], AbstractContextManager[None]],
) -> None:
    save(checkpoints, 3)
    draft = checkpoints.begin(9, {"generator": FakeEngine("G9")}, {"images": 72})
    with largest_file(length), pytest.raises(SaveFailed) as caught:
        checkpoints.write(draft, GivenUp())
    assert str(caught.value) == (
        f"{folder} cannot be written (File too large): raise the limit on the size of files "
        f"(ulimit -f)"
    )
    assert names(folder) == ["images-000000000024"]
    checkpoints.write(draft, GivenUp())
    assert checkpoints.latest_valid(silent) == folder / "images-000000000072"


def pair(folder: Path) -> tuple[Checkpoints, Checkpoints]:
    """The checkpoints of a run as either of two ranks has them, which never meet."""
    first, second = Alone(world_size=2), Alone(world_size=2, is_first=False)
    second.rank = 1
    return Checkpoints(folder, first), Checkpoints(folder, second)


class RankSnapshot(FakeSnapshot):
    """That of one of several ranks."""

    def __init__(self, rank: int) -> None:
        super().__init__(f"R{rank}", None)
        self.name = f"rank-{rank:05d}-of-00002.000.safetensors"

    def write(self, folder: Path) -> dict[str, Written]:
        folder.mkdir(exist_ok=True)
        return {self.name: write_file(folder / self.name, [self.value.encode()])}


def drafts(folder: Path) -> list[tuple[Checkpoints, Draft]]:
    """The same checkpoint on two ranks."""
    begun = []
    for rank, checkpoints in enumerate(pair(folder)):
        engine = mock.Mock(snapshot=lambda rank=rank: RankSnapshot(rank))
        begun.append((checkpoints, checkpoints.begin(1, {"net": engine}, {"images": 8})))
    return begun


def test_the_first_rank_waits_for_the_files_of_the_others(folder: Path) -> None:
    (first, draft), (second, other) = drafts(folder)
    thread = threading.Thread(target=first.write, args=(draft, GivenUp()))
    thread.start()
    second.write(other, GivenUp())
    thread.join()
    assert names(folder) == ["images-000000000008"]
    assert find_fault(draft.final) is None
    assert sorted(read_meta(draft.final).files) == [
        f"net/rank-{rank:05d}-of-00002.000.safetensors" for rank in range(2)
    ]
    assert names(draft.final) == ["meta.json", "net"]


def test_a_rank_that_cannot_write_tells_the_first_and_nothing_is_left(folder: Path) -> None:
    (first, draft), (second, other) = drafts(folder)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    told = f"{folder} cannot be written (No space left on device): make room on its disk"
    other.folder.mkdir(parents=True)
    with (
        mock.patch.object(RankSnapshot, "write", side_effect=full),
        pytest.raises(SaveFailed, match=re.escape(told)),
    ):
        second.write(other, GivenUp())
    with pytest.raises(SaveFailed, match=re.escape(f"rank 1: {told}")):
        first.write(draft, GivenUp())
    assert names(folder) == []


def test_a_first_rank_that_is_told_to_give_up_waits_no_longer(folder: Path) -> None:
    (first, draft), _ = drafts(folder)
    given_up = GivenUp()
    given_up.tell("rank 1: its disk is gone")
    with pytest.raises(SaveFailed, match="rank 1: its disk is gone"):
        first.write(draft, given_up)
    assert names(folder) == []


def test_what_is_not_finite_is_not_written(checkpoints: Checkpoints, folder: Path) -> None:
    engines = {"generator": FakeEngine(), "discriminator": FakeEngine(not_finite="weights/a")}
    with pytest.raises(NotFinite, match="weights/a of the discriminator"):
        checkpoints.begin(3, engines, {"images": 24})
    with pytest.raises(NotFinite, match="what the recipe remembers"):
        checkpoints.begin(3, {}, {"images": 24, "recipe": {"weight": math.nan}})
    assert not folder.exists()


def test_saving_a_step_again_replaces_it(checkpoints: Checkpoints, folder: Path) -> None:
    save(checkpoints, 3)
    saved(checkpoints, 3, {"generator": FakeEngine("again")}, {"images": 24})
    assert find_fault(folder / "images-000000000024") is None
    engine = FakeEngine()
    checkpoints.load(folder / "images-000000000024", {"generator": engine})
    assert engine.value == "again"


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "expected"),
    [
        (2, 0, [8, 10]),
        (1, 4, [4, 8, 10]),
        (3, 6, [6, 8, 10]),
        (0, 0, [10]),
    ],
)
def test_pruning_keeps_the_last_ones_and_every_nth(
    folder: Path, keep_last: int, keep_every: int, expected: list[int]
) -> None:
    save(Checkpoints(folder, Alone(), keep_last, keep_every), 2, 4, 6, 8, 10)
    assert names(folder) == [f"images-{8 * step:012d}" for step in expected]


def test_progress_is_kept_when_the_global_batch_changes(folder: Path) -> None:
    """Twice the batch halves the steps: step 510 comes after the 998 and 1000 of before."""
    checkpoints = Checkpoints(folder, Alone(), keep_last=2, keep_every=500)
    for step in (500, 998, 1000):
        saved(checkpoints, step, {}, {"images": 8 * step})
    newest = saved(checkpoints, 510, {}, {"images": 16 * 510})
    assert checkpoints.latest_valid(silent) == newest
    assert [images(path) for path in all_checkpoints(folder)] == [4000, 8000, 8160]
    saved(checkpoints, 520, {}, {"images": 16 * 520})
    assert [images(path) for path in all_checkpoints(folder)] == [4000, 8000, 8160, 8320]


def test_what_is_kept_for_good_is_decided_when_it_is_saved(folder: Path) -> None:
    save(Checkpoints(folder, Alone(), keep_last=1, keep_every=3), 3, 4)
    save(Checkpoints(folder, Alone(), keep_last=1, keep_every=0), 5, 6)
    assert [images(path) for path in all_checkpoints(folder)] == [24, 48]


def test_the_one_just_saved_stays_also_where_newer_ones_are_there(folder: Path) -> None:
    """As where the newer ones were taken away, and are put back while the run goes on."""
    checkpoints = Checkpoints(folder, Alone(), keep_last=1)
    save(checkpoints, 9)
    folder.rename(folder.with_name("away"))
    save(checkpoints, 3)
    for path in folder.with_name("away").iterdir():
        path.rename(folder / path.name)
    save(checkpoints, 4)
    assert [images(path) for path in all_checkpoints(folder)] == [32, 72]


def save_as_before(folder: Path, step: int, global_batch: int) -> Path:
    """A checkpoint as runs wrote it that named them by step."""
    written = Checkpoints(folder, Alone(), keep_last=100)
    engine = {"generator": FakeEngine(f"G{step}")}
    path = saved(written, step, engine, {"images": step * global_batch})
    meta = json.loads((path / "meta.json").read_text())
    del meta["kept_for_good"], meta["xxh3_128"]
    (path / "meta.json").write_text(json.dumps(meta))
    return path.rename(folder / f"step-{step:08d}")


def test_checkpoints_named_by_step_are_found_resumed_and_pruned_by_their_images(
    folder: Path,
) -> None:
    before = [save_as_before(folder, step, global_batch=8) for step in (500, 998, 1000)]
    checkpoints = Checkpoints(folder, Alone(), keep_last=2, keep_every=500)
    assert checkpoints.latest_valid(silent) == before[2]
    engine = FakeEngine()
    assert checkpoints.load(before[2], {"generator": engine}) == {"images": 8000}
    assert engine.value == "G1000"
    newest = saved(checkpoints, 501, {"generator": FakeEngine()}, {"images": 8016})
    assert checkpoints.latest_valid(silent) == newest
    assert all_checkpoints(folder) == [before[0], before[2], newest]


def test_a_broken_one_named_by_step_is_reported(folder: Path) -> None:
    older, broken = (save_as_before(folder, step, 8) for step in (3, 9))
    (broken / "meta.json").unlink()
    said: list[str] = []
    assert Checkpoints(folder, Alone()).latest_valid(said.append) == older
    assert said == ["skipping checkpoint step-00000009: it has no meta.json"]


def test_pruning_does_not_count_broken_ones_as_kept(folder: Path) -> None:
    checkpoints = Checkpoints(folder, Alone(), keep_last=2)
    save(checkpoints, 2, 4)
    truncate(folder / "images-000000000032")
    save(checkpoints, 6)
    assert find_fault(folder / "images-000000000016") is None
    assert find_fault(folder / "images-000000000048") is None


def test_the_list_of_files_is_the_whole_folder_but_for_meta(
    checkpoints: Checkpoints, folder: Path
) -> None:
    save(checkpoints, 5)
    meta = json.loads((folder / "images-000000000040" / "meta.json").read_text())
    assert meta["files"] == {
        "discriminator/weights.pt": {"bytes": 2, "xxh3_128": xxhash.xxh3_128_hexdigest(b"D5")},
        "generator/weights.pt": {"bytes": 2, "xxh3_128": xxhash.xxh3_128_hexdigest(b"G5")},
    }
    assert meta["step"] == 5
    assert meta["world_size"] == 1


def test_another_number_of_ranks_reads_it(checkpoints: Checkpoints, folder: Path) -> None:
    save(checkpoints, 5)
    others = Checkpoints(folder, Alone(world_size=2))
    assert others.load(folder / "images-000000000040", {}) == {"images": 40}


def make_former(path: Path) -> None:
    """As versions of before wrote it: sizes of the files only."""
    meta = json.loads((path / "meta.json").read_text())
    files = {name: facts["bytes"] for name, facts in meta["files"].items()}
    former = {"format": "taming_dist.checkpoint.v1", "files": files}
    del meta["xxh3_128"]
    (path / "meta.json").write_text(json.dumps(meta | former))


def test_one_of_before_is_read_and_other_ranks_are_told_in_one_line_how(
    checkpoints: Checkpoints, folder: Path
) -> None:
    save(checkpoints, 5)
    path = folder / "images-000000000040"
    make_former(path)
    assert checkpoints.latest_valid(silent) == path
    assert checkpoints.load(path, {}) == {"images": 40}
    with pytest.raises(UserError, match="on 1 ranks, and this run is on 2: resume once on 1;"):
        Checkpoints(folder, Alone(world_size=2)).load(path, {})


@pytest.mark.parametrize("engine", ["generator", "discriminator"])
def test_a_file_that_was_altered_is_noticed_and_the_checkpoint_before_is_used(
    checkpoints: Checkpoints, folder: Path, engine: str
) -> None:
    save(checkpoints, 3, 9)
    file = folder / "images-000000000072" / engine / "weights.pt"
    file.write_text(file.read_text().lower())
    said: list[str] = []
    assert checkpoints.latest_valid(said.append) == folder / "images-000000000024"
    assert said == [
        f"skipping checkpoint images-000000000072: {engine}/weights.pt was altered: its xxh3 is "
        f"not the one in meta.json"
    ]


def test_a_checkpoint_of_another_stage_is_refused(checkpoints: Checkpoints, folder: Path) -> None:
    save(checkpoints, 5)
    with pytest.raises(UserError, match="holds no transformer"):
        checkpoints.load(folder / "images-000000000040", {"transformer": FakeEngine()})


def test_other_ranks_take_the_first_ones_word_and_report_nothing(
    checkpoints: Checkpoints, folder: Path
) -> None:
    save(checkpoints, 3, 9)
    chosen = folder / "images-000000000024"  # as where the first rank finds the newer one broken
    other = Checkpoints(folder, Alone(2, is_first=False, sent=[chosen]))
    assert other.latest_valid(silent) == chosen
