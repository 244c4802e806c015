"""The chain at W&B: what each command has read is what another has made, as offline files tell."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from taming_dist.formats.manifest import resolve
from taming_dist.models.prior.transformer import Transformer
from taming_dist.models.vqgan import VQGAN
from tests.prepare.tokenization.conftest import RGB, export, write_images
from tests.wandb_files import Told, artifacts, history, records

pytestmark = pytest.mark.slow
REPOSITORY = Path(__file__).resolve().parents[1]
GROUP = "a chain"
PARTS = ("codes", "stage2", "samples")
TRAINING = [
    "+experiment=flickr_transformer",
    "+scale=laptop",
    "data.train=codes",
    "data.val=codes",
    "data.vqgan=vqgan",
    "data.global_batch=4",
    "data.micro_batch=4",
    "data.lanes=4",
    "data.block=4",
    "model/condition=none",
    "model.layers=1",
    "model.heads=2",
    "model.width=16",
    "train.steps=1",
    "train.preview_images=1",
    "run.dir=stage2",
    "log.artifacts=files",
]


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an export in `vqgan`, and what tokenization, stage 2 and sampling made of it in
    `codes`, `stage2` and `samples`, each with W&B offline."""
    folder = tmp_path_factory.mktemp("chain")
    export(folder / "vqgan", RGB(), 16)
    write_images(folder / "images", [8])
    tokenize = [str(REPOSITORY / "tools/tokenize_dataset.py"), "--model", "vqgan", "--shards"]
    asked = [f"log.group={GROUP}", "log.wandb=offline"]
    models = ["transformer=stage2/export", "vqgan=vqgan"]
    for command in (
        [*tokenize, "images", "--out", "codes", "--wandb", "offline", "--wandb-group", GROUP],
        ["-m", "taming_dist.train", *TRAINING, *asked],
        ["-m", "taming_dist.sample", *models, "out=samples", "n=2", *asked],
    ):
        run(folder, command)
    return folder


def run(folder: Path, command: list[str]) -> None:
    known = {name: own for name, own in os.environ.items() if not name.startswith("WANDB")}
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=known | {"OMP_NUM_THREADS": "1", "NETRC": "/dev/null"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "W&B is off" not in done.stderr


def of(chain: Path, name: str, used: bool) -> dict[str, Told]:
    """What a part of the chain has used, or made, by name."""
    return {each.name: each for each in artifacts(chain / name) if each.used == used}


def test_each_part_reads_what_those_before_it_made(chain: Path) -> None:
    images, codes = (
        resolve(str(chain / "images")),
        resolve(str(chain / "codes"), "taming_dist.codes.v1"),
    )
    vqgan = VQGAN.from_pretrained(chain / "vqgan").fingerprint
    transformer = Transformer.from_pretrained(chain / "stage2/export").fingerprint
    named = {
        "images": f"images-{images.fingerprint[:12]}",
        "vqgan": f"vqgan-{vqgan[:12]}",
        "codes": f"codes-{codes.fingerprint[:12]}",
        "transformer": f"transformer-{transformer[:12]}",
    }
    read = {name: set(of(chain, name, True)) for name in PARTS}
    assert read["codes"] == {named["images"], named["vqgan"]}
    assert read["stage2"] == {named["codes"], named["vqgan"]}
    assert read["samples"] == {named["transformer"], named["vqgan"]}
    assert set(of(chain, "codes", False)) == {named["codes"]}
    made = of(chain, "stage2", False)
    assert set(made) == {named["transformer"], f"{named['transformer']}-weights"}
    (pictures,) = of(chain, "samples", False).values()
    assert pictures.name.startswith("samples-")
    assert pictures.facts["made_with"] == {"transformer": transformer, "vqgan": vqgan}
    # W&B joins versions by their digest
    for maker, reader, name in (
        ("codes", "stage2", named["codes"]),
        ("stage2", "samples", named["transformer"]),
    ):
        assert of(chain, maker, False)[name].digest == of(chain, reader, True)[name].digest
    vqgans = {of(chain, name, True)[named["vqgan"]].digest for name in read}
    assert len(vqgans) == 1


def test_artifacts_hold_little_but_for_the_weights_that_are_asked_for(chain: Path) -> None:
    files = {
        re.sub("-[0-9a-f]{12}", "", each.name): each.files
        for name in PARTS
        for each in artifacts(chain / name)
    }
    assert files == {
        "images": {"artifact.json", "manifest.json"},
        "codes": {"artifact.json", "manifest.json"},
        "vqgan": {"artifact.json", "config.json"},
        "transformer": {"artifact.json", "config.json"},
        "transformer-weights": {"model.safetensors"},
        "samples": {"artifact.json", "samples.json", "grid.png"},
    }
    staged = [
        entry
        for name in PARTS
        for each in records(chain / name, "artifact")
        for entry in each.manifest.contents
    ]
    assert all(Path(entry.local_path).is_relative_to(chain) for entry in staged)
    assert all(Path(entry.local_path).is_file() for entry in staged)


def test_the_runs_of_a_chain_are_a_group_and_tell_their_figures(chain: Path) -> None:
    begun = [each for name in PARTS for each in records(chain / name, "run")]
    assert [each.run_group for each in begun] == [GROUP] * 3
    assert [each.job_type for each in begun] == ["tokenize", "train", "sample"]
    (line,) = history(chain / "codes")
    assert line["codes/codebook_usage"] > 0
    assert sum(line["codes/codebook_counts/values"]) == 8 * 4 * 4
    (line,) = history(chain / "samples")
    assert line["sample/images"] == 2


def test_pictures_beside_what_wandb_keeps_are_the_only_ones(chain: Path) -> None:
    """A folder of pictures is read with those inside it, by taming_dist.evaluate for one."""
    found = [path.relative_to(chain / "samples") for path in (chain / "samples").rglob("*.png")]
    assert sorted(map(str, found)) == ["000000.png", "000001.png", "grid.png"]
