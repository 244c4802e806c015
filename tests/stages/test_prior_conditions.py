"""Conditions from code shards through training, validation, previews and the sampling command."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from taming_dist.data.codes import CodeDataset, CodeReader
from taming_dist.errors import UserError
from taming_dist.formats.code_shards import CodeShard, write_codes_manifest
from taming_dist.formats.objects import Boxes
from taming_dist.models.prior.conditions.objects import ORDER
from taming_dist.models.prior.transformer import TransformerConfig
from taming_dist.models.quantizers import VectorQuantizerConfig
from taming_dist.models.vqgan import VQGAN
from taming_dist.sample import SampleConfig
from taming_dist.sample import main as sample
from taming_dist.stages.prior import TokenLossConfig, TransformerRecipe
from taming_dist.training.clock import Clock
from tests.tiny_models import tiny_config

GRID, CODES, SAMPLES = (4, 4), 24, 6
OBJECTS = {"name": "objects", "categories": 5, "vocabulary": 64, "objects": 3}
EACH: dict[str, Any] = {
    "coordinates": {"name": "coordinates", "steps": 32},
    "objects": OBJECTS,
    "object_centers": OBJECTS | {"name": "object_centers"},
    "several": {"name": "several", "of": ["class", "codes", "coordinates", OBJECTS]},
}


@pytest.fixture(scope="module")
def vqgan() -> VQGAN:
    torch.manual_seed(0)
    return VQGAN(tiny_config(VectorQuantizerConfig(codes=CODES, dim=4))).eval()


@pytest.fixture(scope="module")
def folder(vqgan: VQGAN, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with code shards that have every column, `codes`, the VQGAN and a layout."""
    root, drawn = tmp_path_factory.mktemp("conditions"), np.random.default_rng(0)
    facts = {
        "vocab": CODES,
        "tokenizer": {"fingerprint": vqgan.fingerprint},
        "condition": {"vocab": 7, "grid": [2, 3], "fingerprint": "c" * 64},
        "source": {"fingerprint": "e" * 64, "range": [0, SAMPLES], "bad": []},
        "preprocessing": {"size": 8},
    }
    crops = 0.48 * drawn.random((SAMPLES, 1, 5), dtype=np.float32) + 0.01
    boxes = Boxes(
        0.5 * drawn.random((12, 4), dtype=np.float32),
        drawn.integers(0, 5, 12, dtype=np.int32),
        drawn.integers(0, 2, 12, dtype=np.uint8),
        np.array([0, 4, 4, 5, 9, 12]),
    )
    shard = CodeShard(
        facts,
        codes=drawn.integers(0, CODES, (SAMPLES, 1, *GRID), dtype=np.uint16),
        sources=np.arange(SAMPLES),
        keys=[str(number) for number in range(SAMPLES)],
        classes=np.arange(SAMPLES, dtype=np.int32) % 3,
        conditions=drawn.integers(0, 7, (SAMPLES, 1, 2, 3), dtype=np.uint16),
        crops=crops,
        boxes=boxes,
    )
    (root / "codes").mkdir()
    shard.save(root / "codes/codes-000000.tar")
    write_codes_manifest(root / "codes", ["codes-000000.tar"], None)
    vqgan.save_pretrained(root / "vqgan")
    layout = {"objects": [{"category": 4, "box": [0, 0, 1, 1], "flags": ["group"]}]}
    (root / "layout.json").write_text(json.dumps([layout, {"objects": []}]))
    return root


def recipe_of(condition: Any, folder: Path, vqgan: VQGAN, made: Callable[..., Any]) -> Any:
    gpt = TransformerConfig(
        0, [], layers=1, heads=2, width=16, condition=condition, null_prefix=True,
        condition_table="own",
    )  # fmt: skip
    fitted = gpt.fitted(CodeDataset.open(str(folder / "codes")), "codes")
    loss = TokenLossConfig(condition_dropout=0.3)
    return TransformerRecipe(fitted, loss, made(lr=1e-2).context, vqgan)


@pytest.mark.parametrize("name", EACH)
def test_a_condition_trains_validates_and_samples(
    name: str,
    code_recipe: Callable[..., TransformerRecipe],
    folder: Path,
    vqgan: VQGAN,
    tmp_path: Path,
) -> None:
    recipe = recipe_of(EACH[name], folder, vqgan, code_recipe)
    columns = recipe.network.condition.columns
    dataset = CodeDataset.open(str(folder / "codes"))
    reader = CodeReader(dataset, lanes=2, micro_batch=2, columns=columns)
    validation = [(batch, True) for batch in reader.epoch_batches()]
    before = recipe.validate(validation)["nll"]
    for step, batch in zip(range(20), reader.batches(), strict=False):
        list(recipe.train_step([batch], Clock(2, 20, images=2 * step)))
    assert recipe.validate(validation)["nll"] < before
    recipe.export().write(tmp_path / "gpt")
    asked = {"transformer": str(tmp_path / "gpt"), "vqgan": str(folder / "vqgan")}
    sample(SampleConfig(**asked, out=str(tmp_path / "a"), n=3, condition=str(folder / "codes")))
    with Image.open(tmp_path / "a/000002.png") as image:
        assert image.size == (8, 8)
    given: dict[str, Any] = {}
    if name != "coordinates":
        given["condition"] = str(folder / "layout.json")
    if name == "several":
        layout = given["condition"]
        with pytest.raises(UserError, match=r"condition: .*layout\.json is no code shards, which"):
            sample(SampleConfig(**asked, out=str(tmp_path / "b"), n=3, **given))
        given = {"class_id": 2, "condition": {"codes": str(folder / "codes"), "objects": layout}}
    sample(SampleConfig(**asked, out=str(tmp_path / "b"), n=3, guidance=1.5, **given))
    assert (tmp_path / "b/000002.png").exists()


def test_objects_are_shuffled_anew_in_each_step_and_alike_on_any_number_of_ranks(
    code_recipe: Callable[..., TransformerRecipe], folder: Path, vqgan: VQGAN
) -> None:
    recipe = recipe_of(OBJECTS, folder, vqgan, code_recipe)
    one, again, next_one = (recipe._draws(Clock(4, 20, images=at))[ORDER] for at in (0, 0, 4))
    assert one.shape == (4, 3)
    assert torch.equal(one, again)
    assert not torch.equal(one, next_one)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"objects": [{"category": 9, "box": [0, 0, 1, 1]}]}', "category 9, .* are 0 to 4"),
        ('{"objects": [{"category": 1, "box": [0.5, 0, 0.7, 1]}]}', "object 0: its box .* outside"),
        (json.dumps({"objects": [{"category": 1, "box": [0, 0, 1, 1]}] * 4}), "4 objects, more"),
        ('{"objects":', r"layout\.json is not JSON"),
        (None, r"layout\.json: cannot be read"),
    ],
)
def test_a_layout_that_cannot_be_drawn_is_refused_and_nothing_is_written(
    text: str | None,
    message: str,
    code_recipe: Callable[..., TransformerRecipe],
    folder: Path,
    vqgan: VQGAN,
    tmp_path: Path,
) -> None:
    recipe_of(OBJECTS, folder, vqgan, code_recipe).export().write(tmp_path / "gpt")
    layout = tmp_path / "layout.json"
    if text is not None:
        layout.write_text(text)
    asked = {"transformer": str(tmp_path / "gpt"), "vqgan": str(folder / "vqgan")}
    with pytest.raises(UserError, match=message) as refusal:
        sample(SampleConfig(**asked, out=str(tmp_path / "out"), n=2, condition=str(layout)))
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "out").exists()
