"""Checkpoints are whole or not there: broken ones, crashes at any moment, pruning, other worlds."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import xxhash

from taming_dist.engine import checkpoint
from taming_dist.engine.checkpoint import (
    Checkpoints,
    all_checkpoints,
    find_fault,
    remove_unfinished,
)
from taming_dist.errors import UserError


class FakeEngine:
    """Writes its value as an engine writes its files: a folder of its own."""

    def __init__(self, value: str = "") -> None:
        self.value = value

    def save(self, folder: Path, name: str) -> list[Path]:
        (folder / name).mkdir()
        (folder / name / "weights.pt").write_text(self.value)
        return [folder / name / "weights.pt"]

    def load(self, folder: Path, name: str) -> None:
        self.value = (folder / name / "weights.pt").read_text()


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
        checkpoints.save(step, engines, {"images": step * 8})


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
    (lambda path: (path / "meta.json").unlink(), "meta.json is missing or broken"),
    (lambda path: (path / "meta.json").write_text('{"step": 9, "fil'), "meta.json is missing or"),
    (lambda path: (path / "meta.json").write_text("{}"), "meta.json is missing or broken"),
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


@pytest.mark.parametrize("moment", ["_sync", "os.replace", "_remove"])
def test_a_run_killed_while_saving_keeps_the_checkpoint_before(
    checkpoints: Checkpoints, folder: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(checkpoints, 3)

    def killed(*_: Any, **__: Any) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(os if moment == "os.replace" else checkpoint, moment.split(".")[-1], killed)
        with pytest.raises(Killed):
            save(checkpoints, 9)
    assert checkpoints.latest_valid(silent) == folder / "images-000000000024"
    save(checkpoints, 9)
    assert checkpoints.latest_valid(silent) == folder / "images-000000000072"


def test_saving_a_step_again_replaces_it(checkpoints: Checkpoints, folder: Path) -> None:
    save(checkpoints, 3)
    checkpoints.save(3, {"generator": FakeEngine("again")}, {"images": 24})
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
        checkpoints.save(step, {}, {"images": 8 * step})
    saved = checkpoints.save(510, {}, {"images": 16 * 510})
    assert checkpoints.latest_valid(silent) == saved
    assert [images(path) for path in all_checkpoints(folder)] == [4000, 8000, 8160]
    checkpoints.save(520, {}, {"images": 16 * 520})
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
    path = written.save(step, engine, {"images": step * global_batch})
    meta = json.loads((path / "meta.json").read_text())
    del meta["kept_for_good"]
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
    saved = checkpoints.save(501, {"generator": FakeEngine()}, {"images": 8016})
    assert checkpoints.latest_valid(silent) == saved
    assert all_checkpoints(folder) == [before[0], before[2], saved]


def test_a_broken_one_named_by_step_is_reported(folder: Path) -> None:
    older, broken = (save_as_before(folder, step, 8) for step in (3, 9))
    (broken / "meta.json").unlink()
    said: list[str] = []
    assert Checkpoints(folder, Alone()).latest_valid(said.append) == older
    assert said == [
        "skipping checkpoint step-00000009: meta.json is missing or broken (FileNotFoundError)"
    ]


def test_pruning_does_not_count_broken_ones_as_kept(folder: Path) -> None:
    checkpoints = Checkpoints(folder, Alone(), keep_last=2)
    save(checkpoints, 2, 4)
    truncate(folder / "images-000000000032")
    save(checkpoints, 6)
    assert find_fault(folder / "images-000000000016") is None
    assert find_fault(folder / "images-000000000048") is None


def test_deleting_removes_meta_first_so_that_no_torn_folder_looks_whole(
    checkpoints: Checkpoints, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(checkpoints, 2, 4)
    checkpoints.keep_last = 1

    def killed(path: Path, **_: Any) -> None:
        raise Killed

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(Killed):
        checkpoints.prune(folder / "images-000000000032")
    assert find_fault(folder / "images-000000000016") is not None
    assert (folder / "images-000000000016" / "generator" / "weights.pt").is_file()
    assert find_fault(folder / "images-000000000032") is None


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
