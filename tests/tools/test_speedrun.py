"""A speedrun: from folders of images to a record, and records side by side."""

import dataclasses
import json
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from taming_dist.errors import UserError

TOOLS = Path(__file__).parents[2] / "tools"
TOOL = TOOLS / "speedrun.py"
sys.path.insert(0, str(TOOLS))
from benchmarks.machine import Machine  # noqa: E402
from benchmarks.rows import Run  # noqa: E402
from speedruns.records import Point, Record, begin, load, save, save_log  # noqa: E402
from speedruns.shown import grouped, markdown, target  # noqa: E402

TINY = [
    "train.steps=4", "train.log_every=2", "train.validate_every=2", "train.evaluate_every=2",
    "train.checkpoint_every=2", "train.preview_every=0", "train.evaluate_features=random",
    "loss.terms.perceptual.weights=random", "loss.disc_start=1", "loss.discriminator.layers=1",
    "data.size=32", "data.global_batch=2", "data.micro_batch=2", "data.lanes=2", "data.threads=1",
    "model.multipliers=[1,1]", "log.wandb=disabled",
]  # fmt: skip
MACHINE = Machine("CPU", "a processor", 2, 1, 8.0, {}, {})
RUN = Run("0123456789", [], "2026-11-28", MACHINE)


def points(*rfids: float) -> list[Point]:
    return [
        Point(10 * n, 80 * n, 5.0 * n, rfid, 0.5, 15.0, 0.25, 100.0)
        for n, rfid in enumerate(rfids, 1)
    ]


def record(recipe: str, *rfids: float, **changes: Any) -> Record:
    protocol = {"hash": "00c0ffee", "images": 150, "size": 64, "reference": "12345678ab"}
    made = Record(recipe, 23, [], RUN, "87654321ab", protocol, 256, 1024, 90.0, points(*rfids), "")
    return dataclasses.replace(made, log=f"{made.name}.jsonl", **changes)


@pytest.mark.slow
def test_a_recipe_is_trained_measured_and_recorded(tmp_path: Path) -> None:
    draws = np.random.default_rng(0)
    for part, count in (("train", 12), ("val", 8)):
        folder = tmp_path / "images" / part / "one"
        folder.mkdir(parents=True)
        for number in range(count):
            pixels = draws.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
    command = [sys.executable, TOOL, "run", "ours", "--images", "images", "--out", "out"]
    command += ["--seed", "1", "--set", *TINY]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    (made,) = load(tmp_path / "out/records")
    assert (made.recipe, made.seed, made.tokens, made.codes) == ("ours", 1, 256, 1024)
    assert [(point.step, point.images) for point in made.points] == [(2, 4), (4, 8)]
    first, last = made.points
    assert 0 < first.seconds < last.seconds < made.wall_seconds
    assert made.overrides == TINY
    log = (tmp_path / "out/records" / made.log).read_text().splitlines()
    assert [line["eval/rfid"] for line in map(json.loads, log) if "eval/rfid" in line] == [
        first.rfid,
        last.rfid,
    ]
    evaluate = [sys.executable, "-m", "taming_dist.evaluate", "model=out/ours-seed1/export"]
    evaluate += ["data=out/shards/val", "out=found", "features=random", "lpips_weights=random"]
    evaluate += ["size=32"]
    subprocess.run(evaluate, cwd=tmp_path, capture_output=True, check=True)
    found = json.loads((tmp_path / "found/metrics.json").read_text())
    assert found["rfid"] == pytest.approx(last.rfid, rel=1e-4)
    protocols = [each["hash"] for each in found["protocols"] if "rfid" in each["figures"]]
    assert protocols == [made.protocol["hash"]]
    assert f"Protocol {protocols[0]}: 8 images of 32 px" in done.stdout


def test_the_first_baseline_is_what_others_are_timed_to() -> None:
    later = dataclasses.replace(RUN, date="2026-12-24")
    records = [
        record("original", 90.0, 80.0),
        record("original", 70.0, 60.0, run=later),
        record("ours", 85.0, 79.0, 50.0),
        record("slow", 99.0, 81.0),
    ]
    assert target(records) == 80.0
    text = markdown(records)
    rows = [line for line in text.splitlines() if line.startswith("| `")]
    assert [row.split(" | ")[0] for row in rows] == ["| `ours`", *["| `original`"] * 2, "| `slow`"]
    assert [row.split(" | ")[5] for row in rows] == ["10, 160", "5, 80", "10, 160", "not reached"]
    assert "| 15.00 dB | 25%, 100 | [2026-11-28-slow-seed23-0123456.jsonl](speedrun/" in text


@pytest.mark.parametrize(
    "changes",
    [
        {"protocol": record("ours", 1.0).protocol | {"hash": "0badcafe"}},
        {"train": "another"},
        {"codes": 16384},
        {"run": dataclasses.replace(RUN, machine=dataclasses.replace(MACHINE, device="H100"))},
    ],
    ids=["protocol", "data", "codes", "card"],
)  # fmt: skip
def test_records_that_do_not_compare_stand_in_tables_of_their_own(changes: dict[str, Any]) -> None:
    records = [record("original", 80.0), record("ours", 70.0, **changes)]
    assert [len(some) for some in grouped(records)] == [1, 1]
    assert "not reached" in markdown(records)


def test_a_record_is_read_as_it_was_written_and_damage_is_told(tmp_path: Path) -> None:
    lines = [{"samples": 8 * n, "train/loss": 1.0} for n in range(250)]
    lines.append({"samples": 8 * 250, "eval/rfid": 3.0})
    (tmp_path / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    made, folder = record("ours", 3.0), tmp_path / "records"
    assert save_log(made, tmp_path, folder) == made
    file = save(made, folder)
    assert load(folder) == [made]
    log = (folder / made.log).read_text().splitlines()
    assert len(log) <= 101
    assert json.loads(log[-1]) == lines[-1]
    given = json.loads(file.read_text())
    for damage in ("[]", "{", json.dumps(given | {"points": []}), json.dumps(given | {"more": 1})):
        file.write_text(damage)
        with pytest.raises(UserError, match=file.name):
            load(folder)
    with pytest.raises(UserError, match="has no records"):
        load(tmp_path)


def test_a_run_of_other_code_is_not_gone_on_with(tmp_path: Path) -> None:
    assert begin(tmp_path, RUN) == RUN
    assert begin(tmp_path, dataclasses.replace(RUN, date="2027-01-01")).date == RUN.date
    with pytest.raises(UserError, match="begun by commit 0123456789"):
        begin(tmp_path, dataclasses.replace(RUN, commit="abcdef"))


def test_the_page_shows_the_records_that_are_kept(tmp_path: Path) -> None:
    docs = TOOLS.parent / "docs"
    page = tmp_path / "speedrun.md"
    page.write_text((docs / "speedrun.md").read_text())
    main: Callable[[], None] = runpy.run_path(str(TOOL))["main"]
    with pytest.MonkeyPatch.context() as patched:
        words = [TOOL, "table", docs / "speedrun", "--into", page]
        patched.setattr(sys, "argv", [str(word) for word in words])
        main()
    assert page.read_text() == (docs / "speedrun.md").read_text()
    with Image.open(page.with_suffix(".png")) as drawn, Image.open(docs / "speedrun.png") as kept:
        assert drawn.size == kept.size
    for each in load(docs / "speedrun"):
        assert (docs / "speedrun" / each.log).is_file()
        assert not each.overrides, "a record is of a recipe as it is"
