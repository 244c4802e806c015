"""The page in a real browser, served by the command as a user starts it."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from taming_dist import sample
from taming_dist.sampling.again import read_recipe
from taming_dist.sampling.config import SampleConfig

gradio = pytest.importorskip("gradio")
playwright = pytest.importorskip("playwright.sync_api")
REPOSITORY = Path(__file__).resolve().parents[2]
CHROMIUM = Path("/usr/bin/chromium")
WAIT_MS = 60_000


def start(*words: str) -> subprocess.Popen:
    """The command, with the output that a user sees."""
    path = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
    return subprocess.Popen(
        [sys.executable, "-m", "taming_dist.demo", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )


@pytest.fixture(scope="module")
def address(exports: Path) -> Iterator[str]:
    """Where the page of the class-conditional transformer is; the command ends with Ctrl-C."""
    process = start(f"transformer={exports / 'class'}", f"vqgan={exports / 'vqgan'}", "port=0")
    assert process.stdout is not None
    found = re.search(r"http://127\.0\.0\.1:\d+", process.stdout.readline())
    assert found is not None, process.communicate()
    yield found[0]
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if not CHROMIUM.exists():
        pytest.skip(f"there is no {CHROMIUM}")
    with playwright.sync_playwright() as tools:
        found = tools.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    """The page, of which any request to another server and any error of a script is a failure."""
    found = browser.new_page()
    outside: list[str] = []
    own = (address, "data:", "blob:", address.replace("http", "ws", 1))
    found.on(
        "request", lambda asked: None if asked.url.startswith(own) else outside.append(asked.url)
    )
    found.on("pageerror", lambda error: outside.append(str(error)))
    found.goto(address)
    found.get_by_role("button", name="Create", exact=True).wait_for(timeout=WAIT_MS)
    yield found
    found.close()
    assert outside == []


@pytest.mark.slow
def test_a_picture_of_a_class_is_downloaded_with_its_recipe(
    page: Any, exports: Path, tmp_path: Path
) -> None:
    page.get_by_label("Seed").fill("7")
    page.get_by_role("button", name="Create", exact=True).click()
    page.get_by_text("Done: 64 steps.").wait_for(timeout=WAIT_MS)
    with page.expect_download() as told:
        page.get_by_role("link", name=re.compile("KB|B")).first.click()
    told.value.save_as(tmp_path / "picture.png")
    recipe = read_recipe(str(tmp_path / "picture.png"))
    assert recipe.settings["seed"] == 7
    places = {name: str(exports / own) for name, own in PLACES.items()}
    out = tmp_path / "out"
    sample.main(SampleConfig(**places, out=str(out), n=1, seed=7, class_id=0))
    assert (out / "000000.png").read_bytes() == (tmp_path / "picture.png").read_bytes()


PLACES = {"transformer": "class", "vqgan": "vqgan"}


@pytest.mark.slow
def test_a_brushed_picture_is_completed(page: Any, photo: Path) -> None:
    page.get_by_role("tab", name="Complete").click()
    page.get_by_role("button", name="Complete", exact=True).click()
    page.get_by_text("picture: upload one first").wait_for(timeout=WAIT_MS)
    page.set_input_files("#completed input[type=file]", str(photo))
    canvas = page.locator("#brushed canvas").first
    canvas.wait_for(timeout=WAIT_MS)
    page.wait_for_timeout(2000)  # until the editor has drawn what it was given
    box = canvas.bounding_box()
    across, down = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(across, down)
    page.mouse.down()
    page.mouse.move(across + 30, down + 10, steps=5)
    page.mouse.up()
    page.wait_for_timeout(1500)  # the editor sends what was painted after a while
    page.get_by_role("button", name="Complete", exact=True).click()
    page.get_by_text("Done:").locator("visible=true").wait_for(timeout=WAIT_MS)
    page.locator("a[href*='mask.png']:visible").first.wait_for(timeout=WAIT_MS)


@pytest.mark.slow
def test_a_large_picture_shows_how_far_it_is_and_is_stopped(page: Any) -> None:
    for name in ("Height", "Width"):
        page.get_by_role("spinbutton", name=re.compile(name)).fill("512")
        page.keyboard.press("Tab")
    page.get_by_role("button", name="Create", exact=True).click()
    page.get_by_text(re.compile(r"of 65,536 codes \.\.\.")).wait_for(timeout=WAIT_MS)
    page.get_by_role("button", name="Stop").locator("visible=true").click()
    page.get_by_text(re.compile("Stopped: .* were written")).wait_for(timeout=WAIT_MS)


@pytest.mark.slow
def test_an_upload_is_reconstructed(page: Any, photo: Path) -> None:
    page.get_by_role("tab", name="Reconstruct").click()
    page.set_input_files("#reconstructed input[type=file]", str(photo))
    page.wait_for_timeout(1000)
    page.get_by_role("button", name="Reconstruct", exact=True).click()
    page.get_by_text("8 x 10 codes").wait_for(timeout=WAIT_MS)


@pytest.mark.slow
@pytest.mark.parametrize("tab", ["Complete", "Reconstruct"])
def test_an_upload_that_is_no_image_is_refused_in_one_line(
    page: Any, tab: str, tmp_path: Path
) -> None:
    (tmp_path / "letter.png").write_text("Dear all")
    page.get_by_role("tab", name=tab).click()
    places = {"Complete": "#completed", "Reconstruct": "#reconstructed"}
    page.set_input_files(f"{places[tab]} input[type=file]", str(tmp_path / "letter.png"))
    if tab == "Reconstruct":
        page.wait_for_timeout(1000)
        page.get_by_role("button", name="Reconstruct", exact=True).click()
    said = page.get_by_text(
        re.compile("^(picture|image): letter.png: not a JPEG, PNG or WebP file$")
    )
    said.wait_for(timeout=WAIT_MS)


@pytest.mark.slow
def test_a_taken_port_ends_the_command_with_one_line(address: str, exports: Path) -> None:
    port = address.rpartition(":")[2]
    process = start(f"vqgan={exports / 'vqgan'}", f"port={port}")
    said = process.communicate(timeout=120)
    assert process.returncode == 2
    assert said[1].startswith(f"error: port: {port} on 127.0.0.1 cannot be used")
    assert said[1].count("\n") == 1
