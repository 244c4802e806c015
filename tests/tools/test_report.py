"""The report page: its numbers are those of the files, gaps and damage are told, and it needs
nothing outside it."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html import unescape
from html.parser import HTMLParser
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from taming_dist.errors import UserError
from taming_dist.evaluation.comparison import side_by_side
from taming_dist.training.clock import Clock
from taming_dist.training.recipe import Preview
from taming_dist.training.sinks import Sinks

TOOLS = Path(__file__).parents[2] / "tools"
TOOL = TOOLS / "report.py"
sys.path.insert(0, str(TOOLS))

from reports import charts, configs, course, html, pictures, quantities, reading  # noqa: E402
from reports.page import write_page  # noqa: E402

CLASSES = ["a<b>cat", "red_flower"]
SUMMARY: dict[str, Any] = {
    "val_psnr": 20.4,
    "val_psnr_mean_colour": 16.03,
    "val_lpips": 0.261,
    "val_lpips_mean_colour": 0.64,
    "codebook_usage": 0.84,
    "val_nll": 4.31,
    "unigram_entropy": 5.61,
    "machine": "two cores",
    "classes": CLASSES,
    "seconds": {"train_vqgan": 190.0, "tokenize": 9.5},
}


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders that a whole chain leaves behind."""
    folder = tmp_path_factory.mktemp("chain")
    write_metrics(
        folder / "vqgan",
        [
            {"samples": 80, "train/loss": 1.0, "train/rec": 0.4, "train/perceptual": 0.5},
            {"samples": 160, "train/loss": 0.8, "train/rec": 0.3, "train/perceptual": 0.4,
             "train/gan_g": 0.1, "train/gan_d": 1.0, "train/adaptive_weight": 2.0,
             "train/codebook_usage": 0.5, "val/psnr": 18.0},
        ],
    )  # fmt: skip
    write_metrics(
        folder / "transformer",
        [
            {"samples": 80, "train/loss": 5.0, "train/nll": 5.0},
            {"samples": 160, "train/loss": 4.5, "train/nll": 4.5},
            {"samples": 160, "val/nll": 4.6, "val/accuracy": 0.1, "val/bits_per_dim": 0.2,
             "val/nll_by_position": [5.0, None, 4.2]},
        ],
    )  # fmt: skip
    told = [
        {"event": "best", "samples": 160, "metric": "val/nll", "value": 4.6},
        {"event": "exit", "samples": 160, "reason": "no better val/nll in 3 validations"},
    ]
    lines = "\n".join(json.dumps(line) for line in told)
    (folder / "transformer" / "events.jsonl").write_text(lines)
    for images in (80, 160):
        picture = torch.full((3, 8, 8), 200, dtype=torch.uint8)
        preview = Preview(picture, ("validation images", f"samples after {images}"))
        clock = Clock(1, 1000, images)
        Sinks(folder / "transformer", []).image(clock, preview)
    evaluation(folder / "evaluation", 21.5)
    for number in range(2):
        for name in ("input", "reconstruction"):
            write_picture(folder / "evaluation" / "images" / f"{number:03d}-{name}.png")
    images = []
    for number in range(4):
        images.append({"file": f"{number:06d}.png", "class": number % 2})
        write_picture(folder / "samples" / f"{number:06d}.png")
    (folder / "samples" / "samples.json").write_text(json.dumps({"images": images}))
    return folder


def write_metrics(run: Path, rows: list[dict[str, float]]) -> None:
    run.mkdir()
    lines = [json.dumps(row) for row in rows]
    (run / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 30, "train/lo']))


def write_picture(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8, 3), 200, dtype=np.uint8)).save(file)


def write_all(chain: Path, out: Path) -> str:
    runs = [chain / "vqgan", chain / "transformer"]
    write_page(out, "A chain", runs, SUMMARY, [chain / "evaluation"], chain / "samples")
    return out.read_text()


def write_events(run: Path, events: list[dict[str, Any]]) -> None:
    run.mkdir(exist_ok=True)
    (run / "events.jsonl").write_text("".join(f"{json.dumps(event)}\n" for event in events))


def shown(page: str, label: str) -> list[str]:
    """The cells of a row of a table of the page."""
    row = re.search(rf"<th scope=row>(?:<span.*?</span> )?{re.escape(label)}</th>(.*?)</tr>", page)
    assert row is not None, label
    return [unescape(cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", row[1])]


@pytest.fixture
def restarted(tmp_path: Path) -> Path:
    """A run that was killed on 4 ranks, and resumed on 2 with half of the global batch."""
    run = tmp_path / "restarted"
    clocked = [(10, 160, 1800.0, 0.5), (20, 320, 3600.0, 0.6), (60, 480, 9000.0, 0.4)]
    run.mkdir()
    rows = [
        {"step": step, "samples": samples, "time": 0.0, "train/rec": 1.0 / step,
         "throughput/running_s": seconds, "throughput/goodput": share,
         "throughput/images_per_s": 2.0 * step, "throughput/data_wait_fraction": 0.25,
         "throughput/memory_peak_gib": 1.5}
        for step, samples, seconds, share in clocked
    ]  # fmt: skip
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    start = {"device": "NVIDIA H100", "samples": 0}
    write_events(run, [
        {"event": "start", **start, "running_s": 0.0, "ranks": 4},
        {"event": "save", "samples": 320, "stall_s": 0.5},
        {"event": "skip", "samples": 328, "keys": ["a", "b"]},
        {"event": "resume", **start, "running_s": 3600.0, "ranks": 2},
        {"event": "skip", "samples": 328, "keys": ["a", "b"]},
        {"event": "save", "samples": 400, "stall_s": 0.1},
        {"event": "save", "samples": 480, "stall_s": 0.2},
        {"event": "exit", "samples": 480, "reason": "finished", "running_s": 10800.0,
         "goodput": 0.375},
    ])  # fmt: skip
    return run


class Outline(HTMLParser):
    """Collects tags in order and checks that they are closed as they were opened."""

    VOID = ("meta", "img", "input", "path", "circle")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attributes)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag


def outline(page: str) -> Outline:
    parsed = Outline()
    parsed.feed(page)
    assert not parsed.open
    return parsed


def test_a_whole_chain_is_on_one_page(chain: Path, tmp_path: Path) -> None:
    page = write_all(chain, tmp_path / "new" / "report.html")
    tags = [tag for tag, _ in outline(page).seen]
    assert tags.count("img") == 10  # two pairs, four samples, two previews
    assert tags.count("figure") == 11
    assert re.findall("<h2>(.*?)</h2>", page) == [
        "Validation images and their reconstructions", "Samples", "Training, stage 1: VQGAN",
        "Training, stage 2: transformer", "Figures", "Evaluations", "Where the time went",
    ]  # fmt: skip
    for text in ("20.40 dB", "16.03 dB", "4.310", "two cores", "3 min 10 s", "95%", "red flower"):
        assert text in page
    assert "a&lt;b&gt;cat" in page
    assert "a<b>cat" not in page


def test_the_page_needs_nothing_outside_it(chain: Path, tmp_path: Path) -> None:
    page = write_all(chain, tmp_path / "report.html")
    assert "default-src 'none'" in page
    for tag, attributes in outline(page).seen:
        assert tag not in ("link", "iframe", "object")
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith(("#", "data:image/"))
    assert not re.search(r"@import|url\((?!#)", page)


def test_the_same_input_gives_the_same_page(chain: Path, tmp_path: Path) -> None:
    assert write_all(chain, tmp_path / "one.html") == write_all(chain, tmp_path / "two.html")


def test_what_is_not_there_is_left_out(chain: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    write_page(out, "Only a run", [chain / "transformer"])
    page = out.read_text()
    assert re.findall("<h2>(.*?)</h2>", page) == ["Training, stage 2: transformer"]
    assert [tag for tag, _ in outline(page).seen].count("figure") == 5
    titles = re.findall("<figcaption><span>(.*?)</span>", page)
    assert titles[0] == "Loss, nats per token"
    assert titles[3] == "Loss by position, nats"
    assert shown(page, "Best validation") == ["val/nll 4.6 after 160 images"]
    assert shown(page, "End") == ["no better val/nll in 3 validations"]
    assert "Rows, from the top: validation images; samples after 160." in page
    assert page.count("<title>best of transformer: 4.6</title>") == 1


def test_what_is_no_likelihood_is_named_in_its_charts(tmp_path: Path) -> None:
    write_metrics(tmp_path / "run", [
        {"samples": 4, "train/loss": 5.0, "train/masked_nll": 5.0},
        {"samples": 8, "val/masked_nll_by_position": [4.0, 5.2]},
    ])  # fmt: skip
    (run,) = reading.read_runs([tmp_path / "run"])
    assert [chart.quantity.title for chart in quantities.charts_of([run], {}, [])] == [
        "Loss (masked nll), nats per token", "Loss (masked nll) by position, nats"
    ]  # fmt: skip


def test_cost_goodput_and_restarts_are_those_of_all_starts(restarted: Path, tmp_path: Path) -> None:
    write_page(tmp_path / "report.html", "Course", [restarted])
    page = (tmp_path / "report.html").read_text()
    # one hour on four devices, two hours on two
    assert shown(page, "Cost, device-hours") == ["8"]
    assert shown(page, "Hours, over all starts") == ["3"]
    assert shown(page, "Devices") == ["4 x NVIDIA H100, then 2 x NVIDIA H100"]
    assert shown(page, "Goodput") == ["37.5%"]
    assert shown(page, "Restarts") == ["1"]
    assert shown(page, "Skipped steps") == ["1 (with 2 samples)"]
    assert shown(page, "Saves") == ["3 (median stall 0.2 s)"]
    assert shown(page, "Images per second, median") == ["40"]
    assert shown(page, "Waits for data, mean share") == ["25.0%"]
    assert shown(page, "Peak of memory, GiB") == ["1.5"]


@pytest.mark.parametrize(
    ("shares", "text", "is_drawn"),
    [
        ((0.2, 0.4, 0.9), "40.0%", True),
        ((0.2, 0.4, 1.3), "not known: the peak was measured on a busy machine", False),
    ],
)
def test_a_share_of_a_peak_that_was_exceeded_is_not_known(
    tmp_path: Path, shares: tuple[float, ...], text: str, is_drawn: bool
) -> None:
    rows = [
        {"samples": 4 * number, "train/rec": 1.0, "throughput/mfu": share}
        for number, share in enumerate(shares, 1)
    ]
    write_metrics(tmp_path / "run", rows)
    write_page(tmp_path / "report.html", "Speed", [tmp_path / "run"])
    page = (tmp_path / "report.html").read_text()
    assert shown(page, "Model FLOPs utilization, median") == [text]
    assert ("share of the peak" in page) == is_drawn


def test_a_start_that_has_not_told_its_devices_leaves_the_cost_open(restarted: Path) -> None:
    write_events(restarted, [{"event": "start", "samples": 0, "running_s": 0.0}])
    (run,) = reading.read_runs([restarted])
    assert course.device_hours(run) is None
    assert course.goodput(run) == 0.4
    assert course.ending(run).startswith("no end logged")


def test_a_change_of_the_batch_moves_steps_and_not_images(restarted: Path) -> None:
    (run,) = reading.read_runs([restarted])
    (line,) = quantities.lines_of(run, quantities.VQGAN_QUANTITIES[0])
    assert line.x["images"] == [160, 320, 480]
    assert line.x["steps"] == [10, 20, 40]  # the last 160 images were 20 steps of 8
    assert line.x["hours"] == [0.5, 1.0, 2.5]
    assert charts.numbers(quantities.charts_of([run], {}, [])[0])["ends"] == {
        "steps": 40, "images": 480, "hours": 2.5
    }  # fmt: skip


def test_a_long_line_keeps_its_mean_and_its_last_point() -> None:
    points = np.stack([np.arange(10_001.0), np.arange(10_001.0) % 2])
    found = quantities.thinned(points)
    assert found.shape == (2, quantities.POINTS)
    assert found[1, :-1].mean() == pytest.approx(0.5, abs=0.01)
    assert found[:, -1].tolist() == [10_000, 0]


def test_only_keys_that_differ_are_shown_at_first(tmp_path: Path) -> None:
    files = ("optim: {lr: 0.001, name: adam}\ntrain: {steps: 1}\n",
             "optim: {lr: 0.002, name: adam}\ntrain: {steps: true, '<i>': null}\n")  # fmt: skip
    for name, text in zip("ab", files, strict=True):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(text)
    runs = reading.read_runs([tmp_path / "a", tmp_path / "b"])
    assert configs.keys_of(runs) == {
        "optim.lr": {2}, "optim.name": set(), "train.steps": {2}, "train.<i>": {2}
    }  # fmt: skip
    first, whole = configs.config_tables(runs).split("<details>")
    assert shown(first, "optim.lr") == ["0.001", "0.002"]
    assert shown(first, "train.&lt;i&gt;") == ["\N{EM DASH}", "null"]
    assert "optim.name" not in first
    assert shown(whole, "optim.name") == ["adam", "adam"]


def test_whatever_files_say_is_text_on_the_page(tmp_path: Path) -> None:
    bad = "<script>alert('1')</script>\"'>"
    run = tmp_path / "run'\"<b>"
    write_metrics(run, [{"samples": 4, "train/rec": 1.0}])
    write_events(run, [{"event": "start", "samples": 0, "ranks": 1, "device": bad},
                       {"event": "best", "samples": 4, "metric": bad, "value": 1.0},
                       {"event": "exit", "samples": 4, "reason": bad}])  # fmt: skip
    (run / "config.yaml").write_text(json.dumps({"run": {"name": bad}, bad: 1}))
    Sinks(run, []).image(Clock(1, 10, 4), Preview(torch.zeros(3, 8, 8, dtype=torch.uint8), (bad,)))
    write_page(tmp_path / "report.html", bad, [run])
    page = (tmp_path / "report.html").read_text()
    assert [tag for tag, _ in outline(page).seen].count("script") == 1
    assert "alert(" in page
    assert bad not in page


def test_damage_is_told_in_one_line_and_the_rest_is_shown(chain: Path, tmp_path: Path) -> None:
    run = tmp_path / "torn"
    shutil.copytree(chain / "transformer", run)
    (run / "config.yaml").write_text("a: [")
    (run / "images" / "images-000000000240.png").write_bytes(b"\x89PNG\r\n\x1a\nhalf")
    with open(run / "events.jsonl", "ab") as file:
        file.write(b'\n[1]\n{"event": "sa\xff')
    write_page(tmp_path / "report.html", "Torn", [run])
    (said,) = re.findall("<p class=fault.*?</p>", (tmp_path / "report.html").read_text())
    assert re.sub("<.*?>", "", said) == (
        "1 torn: 1 line of metrics.jsonl cannot be read; 2 lines of events.jsonl cannot be read; "
        "config.yaml is damaged; 1 preview cannot be read."
    )


def test_values_of_a_wrong_kind_are_passed_over(tmp_path: Path) -> None:
    write_metrics(tmp_path / "run", [
        {"step": 1, "samples": 4, "train/rec": float("nan")},
        {"step": "x", "samples": 8, "train/rec": "high"},  # type: ignore[dict-item]
        {"samples": 12, "train/rec": 10**400, "throughput/running_s": None},  # type: ignore[dict-item]
    ])  # fmt: skip
    write_events(tmp_path / "run", [{"event": "start", "samples": 0, "ranks": "many"},
                                    {"event": "skip", "samples": 4, "keys": 3},
                                    {"event": "best", "samples": 4, "value": "low"}])  # fmt: skip
    write_page(tmp_path / "report.html", "Odd", [tmp_path / "run"])
    assert shown((tmp_path / "report.html").read_text(), "Cost, device-hours") == ["not logged"]


def test_the_use_of_the_codebook_is_that_of_the_counts(tmp_path: Path) -> None:
    few = [0, 4, 2, 0, 2, 0, 0, 0]  # 3 of 8 codes, entropy 1.5 bits
    many = [1] * 400 + [0] * 200
    many[7] = many[399] = many[3] = 51
    for name, rows in (
        ("few", [(160, few), (80, [1, 0, 0, 0, 0, 0, 0, 0])]),
        ("many", [(160, many), (240, [1, True]), (320, [0, 0]), (400, "x"), (480, [-1, 2])]),
        ("older", [(160, None)]),
    ):
        logged = [
            {"samples": seen, "train/rec": 0.4}
            | ({} if counts is None else {reading.COUNTED: counts})
            for seen, counts in rows
        ]
        write_metrics(tmp_path / name, logged)
    write_page(tmp_path / "report.html", "Codes", [tmp_path / name for name in ("few", "many")])
    page = (tmp_path / "report.html").read_text()
    assert shown(page, "After images") == ["160", "160"]
    assert shown(page, "Codes") == ["8", "600"]
    assert shown(page, "Never used") == ["62.5%", "33.3%"]
    # 1 % are one code of the 8, and six of the 600: 3 * 51 + 3 of 397 + 153 uses
    assert shown(page, "Uses of the most used 1 %") == ["50.0%", "28.4%"]
    assert shown(page, "Perplexity")[0] == "2.83"
    assert "4 lists of val/codebook_counts cannot be read" in page
    (drawing,) = re.findall("<figure class=codes>.*?</figure>", page)
    paths = re.findall("<path class='line s([01])' d='(M[^H]*?)'/></g>", drawing)
    assert [dash for dash, _ in paths] == ["0", "0", "1"]
    assert paths[0][1].count(",") == 3
    assert paths[1][1].count(",") == 128
    # the line ends at the share that was used: three eighths of the 312 from 50 on
    assert paths[0][1].rpartition("L")[2].startswith("167.0,")

    write_page(tmp_path / "report.html", "Older", [tmp_path / "older"])
    page = (tmp_path / "report.html").read_text()
    assert "Use of the codebook" not in page
    assert "codebook_counts" not in page


def test_runs_of_the_same_name_are_told_apart_by_their_folders() -> None:
    assert reading.names([Path("/a/one/vqgan"), Path("/a/two/vqgan")]) == ["one/vqgan", "two/vqgan"]


def test_pictures_are_made_smaller_until_they_fit(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (512, 512, 3), dtype=np.uint8)
    files = [tmp_path / f"{number}.png" for number in range(3)]
    for file in files:
        Image.fromarray(noise).save(file)
    for budget in (10_000_000, 100_000):
        found = pictures.fitted(files, budget)
        assert list(found) == files
        assert sum(map(len, found.values())) <= budget
    assert list(pictures.fitted(files, 2_000)) != files


def test_the_numbers_of_runs_at_the_right_do_not_cover_each_other() -> None:
    found = charts.spread([50.0, 50.0, 50.5, 178.0, 179.0], 12, 180)
    assert all(b - a >= charts.LABEL_GAP for a, b in zip(found, found[1:], strict=False))
    assert found[-1] <= 180


# What colours of linear RGB look like without one kind of cones, doi 10.1109/TVCG.2009.113, table 1
SIGHTS = {
    "all cones": np.eye(3),
    "no L": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
             [-0.003882, -0.048116, 1.051998]],
    "no M": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
             [-0.011820, 0.042940, 0.968881]],
    "no S": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602],
             [0.004733, 0.691367, 0.303900]],
}  # fmt: skip
TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def linear(css: str, name: str) -> np.ndarray:
    """A colour of the page in linear RGB [3]."""
    found = re.search(rf"--{name}: #(\w{{6}})", css)
    assert found is not None
    values = np.array([int(found[1][at : at + 2], 16) / 255 for at in (0, 2, 4)])
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def lab(colour: np.ndarray) -> np.ndarray:
    """CIELAB [3] of linear RGB [3]."""
    x, y, z = np.cbrt(TO_XYZ @ colour.clip(1e-3, 1) / (0.9505, 1, 1.089))
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("scheme", [0, 1], ids=["light", "dark"])
@pytest.mark.parametrize("sight", SIGHTS)
def test_the_colours_of_runs_are_told_apart_by_everyone(scheme: int, sight: str) -> None:
    css = (TOOLS / "reports" / "page.css").read_text().split("prefers-color-scheme: dark")[scheme]
    runs = [linear(css, f"c{number}") for number in range(html.COLOURS)]
    card = TO_XYZ[1] @ linear(css, "card")
    for run in runs:
        low, high = sorted((TO_XYZ[1] @ run, card))
        assert (high + 0.05) / (low + 0.05) > 4.5  # WCAG 2.1, 1.4.3
    seen = [lab(np.array(SIGHTS[sight]) @ run) for run in runs]
    distances = [np.linalg.norm(one - other) for one, other in combinations(seen, 2)]
    assert min(distances) > 18


@pytest.mark.parametrize(("value", "text"), [(0.25, "0.25"), (1500, "1,500"), (20000, "20k"),
                                             (1.2e6, "1.2M"), (0, "0")])  # fmt: skip
def test_ticks_are_short(value: float, text: str) -> None:
    assert charts.short(value) == text


def test_samples_without_classes_are_one_row(tmp_path: Path) -> None:
    write_picture(tmp_path / "000000.png")
    record = {"images": [{"file": "000000.png", "class": None}]}
    (tmp_path / "samples.json").write_text(json.dumps(record))
    assert pictures.sample_rows(tmp_path, []).count("<img") == 1


def test_a_folder_that_is_no_run_is_named_in_one_line(chain: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    command = [sys.executable, str(TOOL), str(chain / "vqgan"), str(tmp_path), "--out", str(out)]
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert refused.stderr == (
        f"error: {tmp_path} is no run (metrics.jsonl, events.jsonl, config.yaml are missing): give "
        f"a run.dir\n"
    )
    assert not out.exists()


def test_the_command_writes_the_page(chain: Path, tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text(json.dumps(SUMMARY))
    command = [sys.executable, str(TOOL), str(chain / "vqgan"), str(chain / "transformer")]
    command += ["--out", str(tmp_path / "report.html"), "--samples", str(chain / "samples")]
    command += ["--summary", str(tmp_path / "summary.json")]
    subprocess.run(command, check=True, capture_output=True)
    assert "Training, stage 1: VQGAN" in (tmp_path / "report.html").read_text()


def evaluation(folder: Path, value: float, **protocol: Any) -> Path:
    known = {"hash": "0" * 8, "size": 64, "images": 50, "figures": ["rfid", "curve"]} | protocol
    folder.mkdir()
    record = {"rfid": value, "curve": [1.0], "protocols": [known]}
    (folder / "metrics.json").write_text(json.dumps(record))
    return folder


def test_evaluations_of_one_protocol_stand_side_by_side(chain: Path, tmp_path: Path) -> None:
    folders = [evaluation(tmp_path / name, value) for name, value in (("a", 21.5), ("b", 30.25))]
    out = tmp_path / "report.html"
    write_page(out, "Two", [chain / "transformer"], {}, folders)
    page = out.read_text()
    assert shown(page, "rfid (00000000)") == ["<b>21.5</b>", "<b>30.25</b>"]
    assert "curve (" not in page


def test_figures_by_class_are_folded_away_with_the_numbers_of_images(
    chain: Path, tmp_path: Path
) -> None:
    by_class = {"figures": ["fid_by_class", "images_by_class"]}
    folders = []
    for name, fids in (("a", [21.5, None, 9.25]), ("b", [30.25, None])):
        folder = evaluation(tmp_path / name, 1.0, **by_class)
        record = json.loads((folder / "metrics.json").read_text())
        record |= {"fid_by_class": fids, "images_by_class": [7, 0, 8][: len(fids)]}
        (folder / "metrics.json").write_text(json.dumps(record))
        folders.append(folder)
    out = tmp_path / "report.html"
    write_page(out, "Two", [chain / "transformer"], {"classes": ["<ants>"]}, folders)
    page = out.read_text()
    folded = page.partition("<summary>By class</summary>")[2].partition("</details>")[0]
    heads = [head for head in re.findall(r"scope=col>(.*?)<", folded) if head != "Class"]
    assert heads == ["fid (00000000)"] * 2 + ["images (00000000)"] * 2
    assert shown(folded, "&lt;ants&gt;") == ["<b>21.5</b>", "<b>30.25</b>", "<b>7</b>", "<b>7</b>"]
    assert shown(folded, "1") == ["", "", "<b>0</b>", "<b>0</b>"]
    assert shown(folded, "2") == ["<b>9.25</b>", "", "<b>8</b>", ""]
    write_page(out, "One", [chain / "transformer"], {}, [chain / "evaluation"])
    assert "By class" not in out.read_text()


def test_figures_of_two_protocols_are_refused_in_one_line(chain: Path, tmp_path: Path) -> None:
    folders = [
        evaluation(tmp_path / "a", 21.5),
        evaluation(tmp_path / "b", 30.25, hash="1" * 8, size=128),
    ]
    command = [sys.executable, str(TOOL), str(chain / "transformer"), "--evaluation"]
    command += [*map(str, folders), "--out", str(tmp_path / "report.html")]
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert refused.stderr == (
        f"error: rfid of {folders[0]} and of {folders[1]} do not compare: their protocols 00000000 "
        f"and 11111111 differ in size (64, 128); evaluate both alike\n"
    )
    assert not (tmp_path / "report.html").exists()


def test_an_evaluation_of_before_protocols_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text("{}")
    with pytest.raises(UserError, match="does not say under which protocols: evaluate again"):
        side_by_side([tmp_path])


@pytest.fixture
def browser() -> Iterator[Any]:
    """The Chromium of this machine."""
    playwright = pytest.importorskip("playwright.sync_api")
    found = shutil.which("chromium")
    if found is None:
        pytest.skip("no chromium on this machine")
    with playwright.sync_playwright() as play:
        opened = play.chromium.launch(executable_path=found, args=["--no-sandbox", "--disable-gpu"])
        yield opened
        opened.close()


def test_a_reader_switches_the_axis_smooths_hides_and_goes_through_the_previews(
    browser: Any, chain: Path, restarted: Path, tmp_path: Path
) -> None:
    runs = [restarted, chain / "vqgan", chain / "transformer"]
    write_page(tmp_path / "report.html", "Runs", runs, SUMMARY, [chain / "evaluation"])
    page = browser.new_context(viewport={"width": 390, "height": 800}).new_page()
    requests, complaints = [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto((tmp_path / "report.html").as_uri())
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert page.evaluate("[...document.images].every(image => image.naturalWidth === 8)")

    line = page.locator(".chart .line[d]:not(.floor)").nth(0)
    paths = [line.get_attribute("d")]
    for choice in ("steps", "hours", "images"):
        page.get_by_label(choice, exact=True).check()
        assert page.locator(".chart").first.locator(f"[data-axis={choice}]").first.is_visible()
        paths.append(line.get_attribute("d"))
    assert paths[0] == paths[3]
    assert len(set(paths)) == 3
    page.get_by_label("Smoothing").focus()
    page.keyboard.press("End")
    assert page.locator(".smoothing output").inner_text() == "20 %"
    assert line.get_attribute("d") not in paths

    page.locator("svg[role=img]").first.focus()
    page.keyboard.press("ArrowLeft")
    assert "images\n1 train: " in page.locator(".readout").first.inner_text()
    page.locator("[data-toggle='1']").uncheck()
    assert not page.locator("td[data-run='1']").first.is_visible()

    assert "after 160 images" in page.locator(".sheet").inner_text()
    page.get_by_label("Images seen").focus()
    page.keyboard.press("Home")
    assert "after 80 images" in page.locator(".sheet").inner_text()
    assert page.locator(".sheet img:visible").get_attribute("data-images") == "80"
    assert (requests, complaints) == ([(tmp_path / "report.html").as_uri()], [])


def test_without_scripts_the_charts_are_there(browser: Any, chain: Path, tmp_path: Path) -> None:
    write_all(chain, tmp_path / "report.html")
    page = browser.new_context(java_script_enabled=False).new_page()
    page.goto((tmp_path / "report.html").as_uri())
    assert page.locator(".chart .line").first.get_attribute("d").startswith("M")
    assert not page.locator("input:visible").count()
    assert page.locator(".sheet img:visible").count() == 1
