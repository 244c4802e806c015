"""Stage 2 where there are several codes at a place: from images to samples, in one process."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from taming_dist.data.codes import CodeDataset
from taming_dist.errors import UserError
from taming_dist.generation.completion import Known, half
from taming_dist.generation.generator import Generator
from taming_dist.models.prior.conditions import CodesCondition, CoordinatesCondition, Unconditional
from taming_dist.models.prior.transformer import Transformer, TransformerConfig
from taming_dist.models.quantizers import ProductQuantizerConfig, ResidualQuantizerConfig
from taming_dist.models.vqgan import VQGAN
from taming_dist.stages.online import Encoder
from tests.stages.tokenized import SAMPLES, learned, tokenized

QUANTIZERS = {
    "product": ProductQuantizerConfig(codes=24, dim=4, tables=2),
    "residual": ResidualQuantizerConfig(codes=24, dim=4, depth=3, initial="random"),
}


@pytest.fixture(scope="module", params=QUANTIZERS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a VQGAN `v`, `images`, and their `codes`, conditioned on themselves."""
    folder = tmp_path_factory.mktemp(request.param)
    tokenized(folder, QUANTIZERS[request.param], "--condition-model", str(folder / "v"))
    return folder


def test_shards_hold_the_codes_of_each_level_and_the_report_their_use(made: Path) -> None:
    vqgan, dataset = VQGAN.from_pretrained(made / "v"), CodeDataset.open(str(made / "codes"))
    assert dataset.grid == vqgan.config.code_shape(8, 8)
    assert dataset.condition is not None
    assert dataset.condition["grid"] == list(dataset.grid)
    report = json.loads((made / "codes" / "report.json").read_text())
    assert report["codes_equal_to_fp32"] == 1
    codes = dataset.samples(range(SAMPLES), ())["codes"]
    assert report["histogram"] == codes.flatten().bincount(minlength=24).tolist()
    if vqgan.config.quantizer.name == "product":
        assert [sum(report["histogram"][k : k + 12]) for k in (0, 12)] == [SAMPLES * 16] * 2


@pytest.mark.parametrize("scheme", ["next_index", "masked"])
def test_a_transformer_learns_them_and_its_export_draws_pictures(
    made: Path, scheme: str, code_recipe: Callable[..., Any], tmp_path: Path
) -> None:
    vqgan, dataset = VQGAN.from_pretrained(made / "v"), CodeDataset.open(str(made / "codes"))
    recipe, batch, before, after = learned(made, vqgan, scheme, code_recipe)
    assert after < before
    assert recipe.preview(batch).picture.shape == (3, 2 * 10 - 2, 2 * 10 - 2)
    recipe.export().write(tmp_path / "t")

    generator = Generator(Transformer.from_pretrained(tmp_path / "t"), vqgan)
    drawn = generator.sample(3, seed=1, batch=2)
    assert drawn.codes.shape == (3, *dataset.grid)
    assert drawn.images.shape == (3, 3, 8, 8)
    torch.testing.assert_close(drawn.images, vqgan.decode_codes(drawn.codes).clamp(-1, 1))
    tiled = generator.pictures(drawn.codes, tile=3)
    torch.testing.assert_close(tiled, drawn.images, atol=1e-4, rtol=1e-4)
    upper = Known(drawn.codes, half("upper", (4, 4)))
    completed = generator.sample(3, seed=2, known=upper).codes
    assert torch.equal(completed[..., :2, :], drawn.codes[..., :2, :])
    assert not torch.equal(completed, drawn.codes)
    with pytest.raises(UserError, match=r"size: (larger images are written code by code of one|a)"):
        generator.sample(1, size=(8, 16))


def test_a_transformer_of_codes_of_another_shape_is_refused(made: Path) -> None:
    vqgan = VQGAN.from_pretrained(made / "v")
    sizes: dict[str, Any] = {"layers": 1, "heads": 2, "width": 8}
    for shape in ([4, 4], [5, 4, 4], [16]):
        transformer = Transformer(TransformerConfig(24, shape, condition=Unconditional(), **sizes))
        with pytest.raises(
            UserError, match=r"vqgan: its codes of an image have the shape \[[23], "
        ):
            Generator(transformer, vqgan)


def test_images_that_are_encoded_as_they_are_read_have_the_same_codes(made: Path) -> None:
    vqgan = VQGAN.from_pretrained(made / "v")
    assert Encoder(vqgan, None, ()).flops(8) > 0
    stored = CodeDataset.open(str(made / "codes")).samples(range(2), ("cond",))
    assert torch.equal(stored["codes"], stored["cond"])


def test_conditions_take_codes_of_any_shape_and_coordinates_their_grid(made: Path) -> None:
    dataset = CodeDataset.open(str(made / "codes"))
    codes = CodesCondition().fitted(dataset, "codes")
    assert codes.length == np.prod(dataset.grid)
    part = codes.part(2, dataset.samples(range(2), ("cond",)))
    assert part.shape == (2, codes.length)
    with pytest.raises(UserError, match="size: the condition's codes have the shape"):
        codes.enlarged((4, 4), (4, 8))
    with pytest.raises(UserError, match="cond: |have no column crop"):
        CoordinatesCondition().fitted(dataset, "codes")
