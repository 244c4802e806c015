"""The report page: everything is in it, nothing outside it is needed, gaps are left out."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from types import ModuleType
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

TOOL = Path(__file__).parents[2] / "tools" / "report.py"
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
def report() -> ModuleType:
    spec = importlib.util.spec_from_file_location("report", TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["report"] = module  # where its dataclasses look up their annotations
    spec.loader.exec_module(module)
    return module


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


def write_all(report: ModuleType, chain: Path, out: Path) -> str:
    runs = (chain / "vqgan", chain / "transformer")
    report.write_report(out, SUMMARY, *runs, [chain / "evaluation"], chain / "samples")
    return out.read_text()


class Outline(HTMLParser):
    """Collects tags in order and checks that they are closed as they were opened."""

    VOID = ("meta", "img", "use", "path")

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


def test_a_whole_chain_is_on_one_page(report: ModuleType, chain: Path, tmp_path: Path) -> None:
    page = write_all(report, chain, tmp_path / "new" / "report.html")
    tags = [tag for tag, _ in outline(page).seen]
    assert tags.count("img") == 9
    assert tags.count("svg") == 10
    assert len(re.findall("<h2>", page)) == 6
    for text in ("20.40 dB", "16.03 dB", "4.310", "two cores", "3 min 10 s", "95%", "red flower"):
        assert text in page
    assert "a&lt;b&gt;cat" in page
    assert "a<b>cat" not in page


def test_the_page_needs_nothing_outside_it(report: ModuleType, chain: Path, tmp_path: Path) -> None:
    page = write_all(report, chain, tmp_path / "report.html")
    for tag, attributes in outline(page).seen:
        assert tag not in ("script", "link", "iframe", "object")
        for name in ("src", "href", "xlink:href"):
            assert (attributes.get(name) or "#").startswith(("#", "data:image/png;base64,"))
    assert not re.search(r"@import|url\((?!#)", page)


def test_curves_take_the_colours_of_the_page(
    report: ModuleType, chain: Path, tmp_path: Path
) -> None:
    page = write_all(report, chain, tmp_path / "report.html")
    drawings = "".join(re.findall(r"<svg.*?</svg>", page, flags=re.DOTALL))
    assert {"var(--first)", "var(--second)", "var(--soft)"} <= set(
        re.findall(r"var\(--\w+\)", drawings)
    )
    assert not re.search(r"stroke: #|fill: #", drawings)


def test_the_same_input_gives_the_same_page(
    report: ModuleType, chain: Path, tmp_path: Path
) -> None:
    first = write_all(report, chain, tmp_path / "one.html")
    assert write_all(report, chain, tmp_path / "two.html") == first


def test_what_is_not_there_is_left_out(report: ModuleType, chain: Path, tmp_path: Path) -> None:
    out = tmp_path / "report.html"
    report.write_page(out, "Only a run", {}, {"Run": chain / "transformer"})
    page = out.read_text()
    assert re.findall("<h2>(.*?)</h2>", page) == ["Run"]
    assert [tag for tag, _ in outline(page).seen].count("svg") == 4


def test_a_prior_has_both_losses_in_one_chart_its_best_its_end_and_its_last_preview(
    report: ModuleType, chain: Path
) -> None:
    page = report.training(chain / "transformer", {})
    both, *others = re.findall("<figcaption>(.*?)</figcaption>", page)
    assert both.startswith("Loss, nats per token")
    assert ("train" in both, "val" in both) == (True, True)
    assert others[-1] == "Loss by position, nats"
    assert "Best val/nll: 4.6, after 160 images. It ended with: no better val/nll in 3" in page
    assert (
        "Preview after 160 images. Rows, from the top: validation images; samples after 160."
        in page
    )
    assert page.count(">best<") == 1


def test_what_is_no_likelihood_is_named_in_its_charts(report: ModuleType) -> None:
    rows = [{"samples": 4, "train/loss": 5.0, "train/masked_nll": 5.0},
            {"samples": 8, "val/masked_nll_by_position": [4.0, 5.2]}]  # fmt: skip
    page = report.charts(rows, {"unigram_entropy": 6.0})
    assert re.findall("<figcaption>([^<]*)", page) == [
        "Loss (masked nll), nats per token", "Loss (masked nll) by position, nats"
    ]  # fmt: skip


def test_samples_without_classes_are_one_row(
    report: ModuleType, chain: Path, tmp_path: Path
) -> None:
    write_picture(tmp_path / "000000.png")
    record = {"images": [{"file": "000000.png", "class": None}]}
    (tmp_path / "samples.json").write_text(json.dumps(record))
    assert report.sample_rows(tmp_path, []).count("<img") == 1


@pytest.mark.parametrize("seconds_and_text", [(8.3, "8.3 s"), (245, "4 min 05 s"),
                                              (7625, "2 h 07 min")])  # fmt: skip
def test_durations_read_as_a_person_says_them(
    report: ModuleType, seconds_and_text: tuple[float, str]
) -> None:
    assert report.duration(seconds_and_text[0]) == seconds_and_text[1]


def test_a_folder_that_is_no_run_is_named(report: ModuleType, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"metrics\.jsonl is missing"):
        report.write_page(tmp_path / "report.html", "Title", {}, {"Run": tmp_path})
    assert not (tmp_path / "report.html").exists()


def test_the_command_writes_the_page(chain: Path, tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text(json.dumps(SUMMARY))
    command = [sys.executable, str(TOOL), str(chain / "vqgan"), str(chain / "transformer")]
    command += ["--out", str(tmp_path / "report.html"), "--samples", str(chain / "samples")]
    command += ["--summary", str(tmp_path / "summary.json")]
    subprocess.run(command, check=True, capture_output=True)
    assert "Training: vqgan" in (tmp_path / "report.html").read_text()


def evaluation(folder: Path, value: float, **protocol: Any) -> Path:
    known = {"hash": "0" * 8, "size": 64, "images": 50, "figures": ["rfid", "curve"]} | protocol
    folder.mkdir()
    record = {"rfid": value, "curve": [1.0], "protocols": [known]}
    (folder / "metrics.json").write_text(json.dumps(record))
    return folder


def test_evaluations_of_one_protocol_stand_side_by_side(
    report: ModuleType, chain: Path, tmp_path: Path
) -> None:
    folders = [evaluation(tmp_path / name, value) for name, value in (("a", 21.5), ("b", 30.25))]
    out = tmp_path / "report.html"
    report.write_page(out, "Two", {}, {"Run": chain / "transformer"}, folders)
    page = out.read_text()
    assert "<th>rfid (00000000)</th><td><b>21.5</b></td><td><b>30.25</b></td>" in page
    assert "curve (" not in page


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


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no chromium on this machine")
def test_a_browser_shows_it_without_a_sideways_scroll_on_a_phone(
    report: ModuleType, chain: Path, tmp_path: Path
) -> None:
    page = write_all(report, chain, tmp_path / "report.html")
    # The page measures itself in a frame as wide as a phone, because the browser's window is wider.
    (tmp_path / "report.html").write_text(
        page.replace(
            "</body>",
            "<script>parent.postMessage(`wide ${document.documentElement.scrollWidth}, images "
            "${[...document.images].every(i => i.naturalWidth === 8)}`, '*');</script></body>",
        )
    )
    (tmp_path / "frame.html").write_text(
        "<script>addEventListener('message', event => { document.body.append(event.data); });"
        "</script><body><iframe src=report.html width=390 height=800 frameborder=0></iframe>"
    )
    options = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
    options += "--disable-background-networking --disable-component-update --dump-dom "
    options += "--hide-scrollbars --virtual-time-budget=4000"
    command = ["chromium", *options.split(), f"--user-data-dir={tmp_path / 'profile'}"]
    browser = subprocess.run(
        [*command, (tmp_path / "frame.html").as_uri()],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert "wide 390, images true" in browser.stdout, browser.stderr[-2000:]


def test_the_course_of_a_run_counts_a_step_that_was_skipped_twice_once(report: ModuleType) -> None:
    told = [
        {"event": "start", "samples": 0},
        {"event": "save", "samples": 4, "stall_s": 0.5},
        {"event": "skip", "samples": 8, "keys": ["a", "b"]},
        {"event": "resume", "samples": 4},
        {"event": "skip", "samples": 8, "keys": ["a", "b"]},
        {"event": "save", "samples": 12, "stall_s": 0.1},
        {"event": "save", "samples": 16, "stall_s": 0.2},
        {"event": "exit", "samples": 16, "reason": "finished", "goodput": 0.934},
    ]
    assert report.remarks(None, told) == (
        "<p>Goodput 93.4%, 1 restart, 1 skipped step (with 2 samples), "
        "3 saves (median stall 0.2 s).</p>"
    )
