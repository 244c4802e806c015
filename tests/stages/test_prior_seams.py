"""A condition and an order that nobody else knows of train and sample through the usual commands'
paths: one class and one registry line each."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from taming_dist.data.codes import CodeDataset, CodeReader
from taming_dist.errors import UserError
from taming_dist.formats.code_shards import CodeShard, write_codes_manifest
from taming_dist.models.prior.conditions import CONDITIONS, Columns, Condition
from taming_dist.models.prior.orders import ORDERS, Grid, Order
from taming_dist.models.prior.transformer import Transformer, TransformerConfig
from taming_dist.models.quantizers import VectorQuantizerConfig
from taming_dist.models.vqgan import VQGAN
from taming_dist.sample import SampleConfig
from taming_dist.sample import main as sample
from taming_dist.stages.prior import TokenLossConfig, TransformerRecipe
from taming_dist.training.clock import Clock
from tests.tiny_models import tiny_config

GRID, CODES, BINS, SAMPLES = (3, 4), 24, 8, 6


@dataclass
class ToyCoordinates(Condition):
    """Where the sample lies in its image: left and top, in a number of steps."""

    bins: int = BINS
    name: str = "toy_coordinates"
    columns: ClassVar[tuple[str, ...]] = ("crop",)

    @property
    def length(self) -> int:
        return 2

    @property
    def vocabulary(self) -> int:
        return self.bins

    def part(self, count: int, columns: Columns) -> Tensor:
        if "crop" not in columns:
            raise UserError("condition: give code shards with coordinates")
        return (columns["crop"][:, :2] * self.bins).long().clamp(max=self.bins - 1)


@dataclass
class ToyRandom(Order):
    """Another order for each sample in training, which is told which token it is to predict."""

    name: str = "toy_random"
    drawn: ClassVar[bool] = True
    target_aware: ClassVar[bool] = True

    def places(self, grid: Grid) -> Tensor:
        return torch.arange(grid[0] * grid[1])

    def draw(self, count: int, grid: Grid, progress: float, generator: torch.Generator) -> Tensor:
        assert 0 <= progress < 1
        return torch.rand(count, grid[0] * grid[1], generator=generator)


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CONDITIONS, "toy_coordinates", ToyCoordinates)
    monkeypatch.setitem(ORDERS, "toy_random", ToyRandom)


@pytest.fixture
def vqgan() -> VQGAN:
    torch.manual_seed(0)
    quantizer = VectorQuantizerConfig(codes=CODES, dim=4)
    return VQGAN(tiny_config(quantizer)).eval()


def write_codes(folder: Path, vqgan: VQGAN, crops: bool = True) -> CodeDataset:
    facts = {
        "vocab": CODES,
        "tokenizer": {"fingerprint": vqgan.fingerprint},
        "source": {"fingerprint": "e" * 64, "range": [0, SAMPLES], "bad": []},
        "preprocessing": {"size": 8},
    }
    drawn = np.random.default_rng(0)
    shard = CodeShard(
        facts,
        codes=drawn.integers(0, CODES, (SAMPLES, 1, *GRID), dtype=np.uint16),
        sources=np.arange(SAMPLES),
        keys=[str(number) for number in range(SAMPLES)],
        crops=drawn.random((SAMPLES, 1, 5), dtype=np.float32) if crops else None,
    )
    folder.mkdir()
    shard.save(folder / "codes-train-000000.tar")
    write_codes_manifest(folder, ["codes-train-000000.tar"], None)
    return CodeDataset.open(str(folder))


def test_a_condition_and_an_order_of_ones_own_train_and_sample(
    code_recipe: Callable[..., TransformerRecipe], vqgan: VQGAN, tmp_path: Path
) -> None:
    dataset = write_codes(tmp_path / "codes", vqgan)
    gpt = TransformerConfig(
        0, [], layers=1, heads=2, width=16, condition="toy_coordinates", order="toy_random"
    )
    context = code_recipe(lr=1e-2).context
    recipe = TransformerRecipe(gpt.fitted(dataset, "codes"), TokenLossConfig(), context, vqgan)
    columns = recipe.network.condition.columns
    reader = CodeReader(dataset, lanes=2, micro_batch=2, columns=columns)
    validation = [(batch, True) for batch in reader.epoch_batches()]
    before = recipe.validate(validation)["nll"]
    for step, batch in zip(range(20), reader.batches(), strict=False):
        list(recipe.train_step([batch], Clock(2, 20, images=2 * step)))
    assert recipe.validate(validation)["nll"] < before
    assert recipe.preview(validation[0][0]) is not None
    recipe.export().write(tmp_path / "gpt")
    vqgan.save_pretrained(tmp_path / "vqgan")
    asked = {"transformer": str(tmp_path / "gpt"), "vqgan": str(tmp_path / "vqgan")}
    sample(SampleConfig(**asked, out=str(tmp_path / "out"), n=3, condition=str(tmp_path / "codes")))
    with Image.open(tmp_path / "out" / "000002.png") as image:
        assert image.size == (8, 6)
    with pytest.raises(UserError, match="condition: give code shards with coordinates"):
        sample(SampleConfig(**asked, out=str(tmp_path / "none"), n=3))
    loaded = Transformer.from_pretrained(tmp_path / "gpt")
    assert (loaded.condition, loaded.order) == (ToyCoordinates(), ToyRandom())


def test_codes_without_the_column_that_it_names_are_refused(vqgan: VQGAN, tmp_path: Path) -> None:
    plain = write_codes(tmp_path / "codes", vqgan, crops=False)
    gpt = TransformerConfig(0, [], layers=1, heads=2, width=16, condition="toy_coordinates")
    with pytest.raises(UserError, match="have no column crop: run .* with --coordinates"):
        gpt.fitted(plain, "codes")
