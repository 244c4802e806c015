"""A dry run: every experiment is composed, checked, built on the meta device, and counted."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from taming_dist.dry_run import dry_run, is_dry
from taming_dist.errors import UserError
from taming_dist.stages.interface import Config
from taming_dist.usage import conf_dir

Compose = Callable[..., Config]
FILES = sorted((conf_dir() / "experiment").glob("*.yaml"))
PAGE = (conf_dir().parent / "docs" / "prior.md").read_text()
PRIORS = [path.stem for path in FILES if "override /loss: tokens" in path.read_text()]
OTHERS = [path.stem for path in FILES if path.stem not in PRIORS]


# Millions of trained parameters: published, or read off the original's network of these sizes; and
# within how many they have to be, as the publication rounds or says of something that is not here.
PUBLISHED = {
    "flickr_segmentation_transformer": (304.93, 0.01),  # the original's, of 512 positions
    "drin_transformer": (304.93, 0.01),
    "faceshq_transformer": (304.93, 0.01),
    "imagenet_transformer": (1400, 50),  # "1.4 B"
    "ffhq_transformer": (801, 1),
    "open_images_scenes_transformer": (1000, 50),  # "1B"
    "llamagen_b": (111, 0.5),
    "llamagen_l": (343, 0.5),
    "llamagen_xl": (775, 0.5),
    "llamagen_xxl": (1400, 50),  # "1.4B"
    "rar_b": (261 - 2, 0.5),  # without rows that nothing reads and embeddings of steps
    "maskgit": (227 - 54, 1),  # without the tokenizer
}


@pytest.mark.parametrize("name", PRIORS + [pytest.param(n, marks=pytest.mark.slow) for n in OTHERS])
def test_every_experiment_tells_its_networks_and_memory(compose: Compose, name: str) -> None:
    """Those of stage 2 as docs/prior.md has them, those that are published as published."""
    said = dry_run(compose(f"+experiment={name}", "+dry_run=true"), launched=1)
    networks = [line for line in said.splitlines() if line.startswith("network ")]
    assert all(" M trained, " in line for line in networks)
    assert networks[0].split()[1] in ("generator", "transformer")
    rows = [line.split() for line in said.splitlines() if " zero" in line]
    assert [row[-8] for row in rows] == [f"zero{stage}" for stage in range(4)]
    assert all(float(row[-2]) > 0 for row in rows)
    assert rows[0][0] == ">"
    if name in PRIORS:
        (row,) = (line for line in PAGE.splitlines() if line.startswith(f"| `{name}` |"))
        assert row.split("|")[-2].strip() == networks[0].split()[2]
    if name in PUBLISHED:
        millions, tolerance = PUBLISHED[name]
        found = float(networks[0].split()[2].replace(",", ""))
        assert found == pytest.approx(millions, abs=tolerance)


def test_the_command_prints_it_and_writes_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "taming_dist.train", "+experiment=flickr", "+dry_run=8"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert "encoder 29.298 M, decoder 42.450 M" in done.stdout
    assert "24 images = 8 ranks x 3 x 1 micro-batches" in done.stdout
    assert "losses 0.000 M trained, 14.716 M frozen" in done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("+experiment=flickr", "+dry_run=0"), "dry_run=0: use true, or a number of ranks from 1"),
        (("+experiment=flickr", "+dry_run=7"), "data.global_batch=24 is not a multiple of"),
        (("+experiment=flickr", "+dry_run=true", "data.size=100"), "data.size=100"),
        (
            ("+experiment=flickr_transformer", "+dry_run=true", "model.grid=[]"),
            "give both, as model.vocabulary=1024 model.grid=[16,16]",
        ),
        (
            ("+experiment=drin_transformer", "+dry_run=true", "model.condition.grid=[]"),
            "model.condition.grid=[]",
        ),
    ],
)
def test_what_could_not_start_is_one_line(
    compose: Compose, overrides: tuple[str, ...], said: str
) -> None:
    with pytest.raises(UserError) as refusal:
        dry_run(compose(*overrides), launched=1)
    assert said in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_the_average_and_a_discriminator_that_stays_at_zero_2_are_counted(
    compose: Compose,
) -> None:
    def sums(*overrides: str) -> list[float]:
        said = dry_run(compose("+experiment=flickr", "+dry_run=8", *overrides), launched=1)
        return [float(line.split()[-2]) for line in said.splitlines() if " zero" in line]

    plain = sums()
    assert sums("optim.ema_half_life=1000")[0] - plain[0] == pytest.approx(4 * 72.1e6 / 2**30, 0.01)
    with_r1 = sums("loss.r1_weight=1")
    assert with_r1[:3] == plain[:3]
    assert with_r1[3] != plain[3]


def test_only_what_was_asked_for_is_a_dry_run(compose: Compose) -> None:
    assert not is_dry(compose("+experiment=flickr"))
    assert not is_dry(compose("+experiment=flickr", "dry_run=false"))
    assert is_dry(compose("+experiment=flickr", "dry_run=true"))
