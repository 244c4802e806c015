"""A comparison of tokenizers: recipes with several seeds, their records, one table, one picture."""

import dataclasses
import math
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
TOOL = TOOLS / "compare_tokenizers.py"
sys.path[:0] = [str(TOOLS), str(Path(__file__).parent)]
from speedruns.compared import markdown  # noqa: E402
from speedruns.records import Probe, Record, load, save  # noqa: E402
from speedruns.running import recipes  # noqa: E402
from test_speedrun import RUN, TINY, record  # noqa: E402

WITHOUT_GAN = [word for word in TINY if "discriminator" not in word]
WITHOUT_GAN += ["train.validate_images=8"]
PROBE = ["probe_layers=1", "probe_width=64", "probe_images=64"]


def compare(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, TOOL, "run", *words, "--images", "images", "--out", "out"]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def rows(text: str) -> list[list[str]]:
    """The cells of the rows that are of recipes."""
    return [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| `")]


@pytest.mark.slow
def test_recipes_are_trained_with_all_seeds_and_what_has_a_record_is_not_trained_again(
    tmp_path: Path,
) -> None:
    draws = np.random.default_rng(0)
    for part, count in (("train", 64), ("val", 64)):
        folder = tmp_path / "images" / part / "one"
        folder.mkdir(parents=True)
        for number in range(count):
            pixels = draws.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"{number}.png")
    settings = ["--set", *WITHOUT_GAN]
    done = compare(tmp_path, "simvq", "--seeds", "1", *settings, "--probe", *PROBE)
    assert done.returncode == 0, done.stderr[-3000:]
    records = tmp_path / "out/records"
    (first,) = load(records)
    assert first.probe is not None
    assert first.probe.figures["probe_nll"] > 0
    assert first.memory_gib is not None
    (tmp_path / "out/simvq-seed1/metrics.jsonl").unlink()  # so that it is not looked at again
    done = compare(tmp_path, "simvq", "fsq", "--seeds", "1", "2", *settings)
    assert done.returncode == 0, done.stderr[-3000:]
    found = {(each.recipe, each.seed): each for each in load(records)}
    assert set(found) == {("simvq", 1), ("fsq", 1), ("simvq", 2), ("fsq", 2)}
    assert found["simvq", 1] == first
    assert len({each.train for each in found.values()}) == 1
    ours = {cells[0]: cells for cells in rows(done.stdout)}
    assert {name: cells[1:4] for name, cells in ours.items()} == {
        "`simvq`": ["16,384", "256", "1, 2"],
        "`fsq`": ["15,360", "256", "1, 2"],
    }
    rfids = [found["fsq", seed].last.rfid for seed in (1, 2)]
    assert f"{sum(rfids) / 2:.1f} ± {abs(rfids[0] - rfids[1]) / 2:.1f}" in ours["`fsq`"]
    with Image.open(records / "reconstructions.png") as picture:
        assert picture.size == (1100, 300)  # the images, and what two tokenizers make of them


@pytest.mark.parametrize("recipe", sorted(recipes("comparison", "speedrun")))
def test_a_recipe_changes_neither_the_images_nor_the_steps(
    compose: Callable[..., Any], recipe: str
) -> None:
    """And has as many codes an image as the others, but for those of several codes a position."""
    group = recipes("comparison", "speedrun")[recipe]
    config = compose("+experiment=comparison", f"+{group}={recipe}")
    plain = compose("+experiment=comparison", "+comparison=vector")
    assert config.data == plain.data
    assert config.train == plain.train
    several = {"product": 4 * 256, "residual": 4 * 256, "multiscale": 680}
    assert math.prod(config.model.code_shape(64, 64)) == several.get(recipe, 256)


def of_seeds(recipe: str, *rfids: float, **changes: object) -> list[Record]:
    return [record(recipe, rfid, seed=seed, **changes) for seed, rfid in enumerate(rfids)]


def test_a_row_has_the_mean_over_seeds_and_half_their_range_and_the_best_is_first() -> None:
    text = markdown([*of_seeds("original", 100.0, 110.0), *of_seeds("ours", 80.0, 74.0)])
    (ours, original) = rows(text)
    assert ours[:4] == ["`ours`", "1,024", "256", "0, 1"]
    assert (ours[6], original[6]) == ("77.0 ± 3.0", "105.0 ± 5.0")
    assert (ours[-2:], original[-2:]) == (["-27%", "0123456"], ["+0%", "0123456"])
    assert "memory" not in text
    (alone,) = rows(markdown(of_seeds("ours", 80.0)))
    assert alone[6] == "80.0"


def test_a_row_names_the_commits_of_its_records() -> None:
    """As a recipe that is added later has another commit than the rest."""
    later = dataclasses.replace(RUN, commit="abcdef", changed=["conf/x.yaml"])
    (ours, _) = rows(markdown([*of_seeds("original", 100.0), *of_seeds("ours", 80.0, run=later)]))
    assert ours[-1] == "abcdef with changes"


@pytest.mark.parametrize(
    "changes",
    [{"overrides": ["train.steps=3"]}, {"train": "another"}],
    ids=["keys", "data"],
)
def test_what_was_not_equal_stands_in_tables_of_its_own(changes: dict[str, object]) -> None:
    text = markdown([*of_seeds("original", 100.0), *of_seeds("ours", 80.0, **changes)])
    assert text.count("Protocol 00c0ffee") == 2


def test_probes_of_two_protocols_are_not_put_into_one_table(tmp_path: Path) -> None:
    probes = [Probe(PROBE, each, {"probe_nll": 500.0}) for each in ("0badcafe", "00c0ffee")]
    one, other = (of_seeds("ours", 80.0, probe=probe)[0] for probe in probes)
    save(one, tmp_path)
    assert load(tmp_path) == [one]
    text = markdown([one, *of_seeds("original", 100.0)])
    assert [cells[-3] for cells in rows(text)] == ["500.0", ""]
    with pytest.raises(UserError, match="protocols 00c0ffee and 0badcafe"):
        markdown([one, dataclasses.replace(other, seed=7)])


def test_the_page_shows_the_records_that_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    docs = TOOLS.parent / "docs"
    page = tmp_path / "page.md"
    page.write_text((docs / "choosing-a-tokenizer.md").read_text())
    folders = [docs / "comparison" / name for name in ("codebooks", "longer", "recipes")]
    words = [TOOL, "table", *folders, "--into", page]
    monkeypatch.setattr(sys, "argv", [str(word) for word in words])
    runpy.run_path(str(TOOL))["main"]()
    assert page.read_text() == (docs / "choosing-a-tokenizer.md").read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["ours", "ours"], "recipes: ours is there twice"),
        (["ours", "--seeds", "1", "1"], "seeds: 1 is there twice"),
        (["theirs"], "invalid choice: 'theirs'"),
        (["ours"], "there is no folder images/train"),
    ],
    ids=["recipe", "seed", "name", "images"],
)
def test_bad_input_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(TOOL), "run", *words, "--images", "images", "--out", "o"])
    with pytest.raises(UserError, match=said) as told:
        runpy.run_path(str(TOOL))["main"]()
    assert "\n" not in str(told.value)
    assert not (tmp_path / "o").exists()
