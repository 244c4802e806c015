"""Sinks one by one: other ranks are silent, W&B cannot stop a run, files are cut and replaced."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from taming_dist.training.clock import Clock
from taming_dist.training.console import Console
from taming_dist.training.recipe import Preview
from taming_dist.training.sinks import (
    MetricsFile,
    Sinks,
    append_line,
)

CLOCK = Clock(global_batch=4, total_steps=10, images=12)
BLACK = Preview(torch.zeros(3, 2, 2, dtype=torch.uint8), ("nothing",))


def at(step: int) -> Clock:
    return Clock(global_batch=4, total_steps=10, images=4 * step)


def steps(folder: Path) -> list[int]:
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["step"] for line in lines]


def test_every_rank_but_the_first_is_silent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    sinks = Sinks(None, [])
    sinks.log(CLOCK, {"train/loss": 1.0})
    sinks.image(CLOCK, BLACK)
    sinks.event("save", CLOCK)
    sinks.note("hello")
    sinks.rewind(CLOCK)
    with sinks:
        pass
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


def test_a_number_that_is_not_finite_is_left_out_of_the_line(tmp_path: Path) -> None:
    MetricsFile(tmp_path).log(CLOCK, {"train/loss": float("nan"), "train/lr": 0.5})
    append_line(tmp_path / "bad_samples.jsonl", {"key": "caf\\xe9", "shard": "/caf\udce9"})

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    record = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert "train/loss" not in record
    assert record["train/lr"] == 0.5
    bad = json.loads((tmp_path / "bad_samples.jsonl").read_text(encoding="utf-8"))
    assert bad == {"key": "caf\\xe9", "shard": "/caf\\xe9"}


def test_a_metrics_line_has_step_samples_time_and_the_numbers(tmp_path: Path) -> None:
    MetricsFile(tmp_path).log(CLOCK, {"train/loss": 0.1 + 0.2})
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    record = json.loads(line)
    assert record.pop("time") > 1.7e9
    assert record == {"step": 3, "samples": 12, "train/loss": 0.1 + 0.2}


def test_rewinding_cuts_later_and_torn_lines_and_keeps_the_rest_byte_for_byte(
    tmp_path: Path,
) -> None:
    sink = MetricsFile(tmp_path)
    sink.rewind(at(0))  # nothing there yet
    for step in (1, 2, 3, 4):
        sink.log(at(step), {"a": 1 / step})
    whole = (tmp_path / "metrics.jsonl").read_text()
    with open(sink.path, "a") as file:
        file.write('{"step": 5, "a": 0.')
    sink.rewind(at(3))
    kept = (tmp_path / "metrics.jsonl").read_text()
    assert kept == "".join(whole.splitlines(keepends=True)[:3])
    sink.log(at(4), {"a": 7.0})
    assert steps(tmp_path) == [1, 2, 3, 4]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize(
    ("good", "bad"), [(b'"a"', b'"\xc3"'), (b"samples", b"sampmes"), (b":", b"z")]
)
def test_a_damaged_line_is_told_and_left_out(
    tmp_path: Path, good: bytes, bad: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    sink = MetricsFile(tmp_path)
    for step in (1, 2, 3):
        sink.log(at(step), {"a": 1.0})
    lines = sink.path.read_bytes().splitlines(keepends=True)
    lines[1] = lines[1].replace(good, bad)
    sink.path.write_bytes(b"".join(lines))
    assert sink.find(at(3), "train") is None
    sink.rewind(at(3))
    assert steps(tmp_path) == [1, 3]
    assert caplog.messages == [f"{sink.path}: line 2 is damaged and was left out"]


def test_rewinding_goes_by_images_because_steps_change_with_the_global_batch(
    tmp_path: Path,
) -> None:
    sink = MetricsFile(tmp_path)
    for step in (3, 4):
        sink.log(at(step), {"a": 1.0})
    doubled = Clock(global_batch=8, total_steps=10, images=16)
    sink.rewind(doubled)
    doubled.tick()
    sink.log(doubled, {"a": 1.0})
    sink.rewind(Clock(global_batch=4, total_steps=10, images=16))
    assert steps(tmp_path) == [3, 4]


def test_previews_of_another_global_batch_take_no_places_of_earlier_ones(tmp_path: Path) -> None:
    sinks = Sinks(tmp_path, [])
    for clock in (at(3), Clock(global_batch=8, total_steps=10, images=24)):
        sinks.image(clock, BLACK)
    names = sorted(path.name for path in (tmp_path / "images").iterdir())
    assert names == ["images-000000000012.png", "images-000000000024.png"]


def test_a_preview_is_written_whole_as_png_which_says_what_its_rows_show(tmp_path: Path) -> None:
    picture = torch.randint(0, 256, (3, 4, 6), dtype=torch.uint8)
    sinks = Sinks(tmp_path, [])
    sinks.image(CLOCK, Preview(picture, ("images", "samples")))
    sinks.image(at(4), None)
    (path,) = (tmp_path / "images").iterdir()
    assert path.name == "images-000000000012.png"
    with Image.open(path) as image:
        assert np.array_equal(np.asarray(image), picture.permute(1, 2, 0).numpy())
        assert image.info["Description"] == "images; samples"


def test_the_console_prints_plain_lines_where_it_is_no_terminal(
    capsys: pytest.CaptureFixture,
) -> None:
    console = Console(CLOCK, "run")
    record = {"train/loss": 1 / 3, "train/gan_d": float("inf"), "a[b]": 2e-7, "curve": [1.0]}
    console.log(CLOCK, record)
    console.close(failed=False)
    expected = "step 3/10  a[b] 2e-07  train/gan_d inf  train/loss 0.333333\n"
    assert capsys.readouterr().out == expected


def test_a_line_makes_its_folder(tmp_path: Path) -> None:
    append_line(tmp_path / "new" / "bad_samples.jsonl", {"key": "a"})
    assert json.loads((tmp_path / "new" / "bad_samples.jsonl").read_text()) == {"key": "a"}


def test_a_line_after_a_torn_one_stands_on_its_own(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    append_line(path, {"event": "start"})
    with open(path, "a", encoding="utf-8") as file:
        file.write('{"event": "sa')
    append_line(path, {"event": "resume"})
    lines = path.read_text().splitlines()
    assert [json.loads(lines[0]), json.loads(lines[2])] == [{"event": "start"}, {"event": "resume"}]


def test_a_full_disk_costs_lines_and_pictures_and_is_told_once_until_there_is_room(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    sinks = Sinks(tmp_path, [MetricsFile(tmp_path), Console(CLOCK, "run")])
    for name in ("metrics.jsonl", "events.jsonl"):
        (tmp_path / name).symlink_to("/dev/full")
    (tmp_path / "images").write_text("no folder")
    sinks.log(at(1), {"train/loss": 1.0})
    sinks.event("save", at(1))
    sinks.image(at(1), BLACK)
    said = capsys.readouterr().out
    assert said.count("does not take all that is logged (No space left on device)") == 1
    for name in ("metrics.jsonl", "events.jsonl", "images"):
        (tmp_path / name).unlink()
    sinks.log(at(2), {"train/loss": 1.0})
    sinks.event("save", at(2))
    sinks.image(at(2), BLACK)
    assert steps(tmp_path) == [2]
    assert (tmp_path / "images" / "images-000000000008.png").is_file()
    assert "logged" not in capsys.readouterr().out
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    sinks.log(at(3), {"train/loss": 1.0})
    assert "does not take all" in capsys.readouterr().out
