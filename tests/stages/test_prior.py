"""Stage 2 on one process: what a step learns, what validation measures, previews and the export."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from taming_dist.data.codes import CodeBatch
from taming_dist.generation.pictures import image_grid, to_uint8
from taming_dist.models.prior.conditions import CodesCondition
from taming_dist.models.prior.transformer import Transformer
from taming_dist.models.quantizers import VectorQuantizerConfig
from taming_dist.models.vqgan import VQGAN
from taming_dist.training.clock import Clock
from tests.tiny_models import tiny_config

Make = Callable[..., Any]


def codes(seed: int = 0, count: int = 2) -> CodeBatch:
    randomness = torch.Generator().manual_seed(seed)
    drawn = torch.randint(24, (count, 3, 4), generator=randomness)
    classes = torch.randint(3, (count,), generator=randomness)
    return CodeBatch({"codes": drawn, "cls": classes}, torch.arange(count))


def nll(network: Any, batch: CodeBatch) -> float:
    """-log p(s | c) of the definition, the sum over all codes."""
    prefix = network.condition.prefix(len(batch), batch.columns)
    log_p = network(batch.codes.flatten(1), prefix).log_softmax(-1)
    return -float(log_p.gather(-1, batch.codes.flatten(1)[..., None]).sum())


@torch.no_grad()
def test_validation_measures_every_code_once_and_passes_over_batches_that_do_not_count(
    code_recipe: Make,
) -> None:
    made = code_recipe()
    found = made.validate(iter([(codes(), True), (codes(1, count=1), True), (codes(2), False)]))
    whole = nll(made.transformer.module, codes()) + nll(made.transformer.module, codes(1, count=1))
    assert found["nll"] == pytest.approx(whole / (3 * 12), rel=1e-5)
    assert made.transformer.module.training


def test_it_learns_the_codes(code_recipe: Make) -> None:
    made, batch = code_recipe(accumulation=2, lr=1e-2), codes()
    before = made.validate([(batch, True)])["nll"]
    for step in range(20):
        assert len(list(made.train_step([batch, batch], Clock(4, 20, images=4 * step)))) == 2
    assert made.validate([(batch, True)])["nll"] < 0.7 * before


def test_the_export_is_the_trained_network(code_recipe: Make, tmp_path: Path) -> None:
    made = code_recipe()
    list(made.train_step([codes()], Clock(2, 4)))
    made.export().write(tmp_path / "export")
    loaded = Transformer.from_pretrained(tmp_path / "export")
    expected = made.transformer.module.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())


@pytest.fixture(scope="module")
def vqgan() -> VQGAN:
    torch.manual_seed(0)
    quantizer = VectorQuantizerConfig(codes=24, dim=4)
    return VQGAN(tiny_config(quantizer)).eval()


def rows(preview: Any) -> list[torch.Tensor]:
    """The rows of a preview of two images of 6 x 8 pixels."""
    assert preview.picture.shape == (3, 8 * len(preview.rows) - 2, 2 * 8 + 2)
    return [preview.picture[:, top : top + 6] for top in range(0, 8 * len(preview.rows), 8)]


def test_previews_are_samples_below_the_images_from_the_same_random_numbers_every_time(
    code_recipe: Make, vqgan: VQGAN
) -> None:
    assert code_recipe().preview(codes()) is None
    made = code_recipe(lr=0.1, vqgan=vqgan)
    drawn = made.preview(codes())
    assert drawn.rows == ("validation images, decoded", "samples under their conditions")
    assert torch.equal(drawn.picture, made.preview(codes()).picture)
    shown, samples = rows(drawn)
    decoded = to_uint8(vqgan.decode_codes(codes().codes))
    assert torch.equal(shown, image_grid(decoded, columns=2))
    list(made.train_step([codes()], Clock(2, 4)))
    later = rows(made.preview(codes()))
    assert torch.equal(later[0], shown)
    assert not torch.equal(later[1], samples)


def test_previews_of_a_network_that_can_be_guided_have_a_guided_row(
    code_recipe: Make, vqgan: VQGAN
) -> None:
    given = {"vqgan": vqgan, "condition_dropout": 0.5, "lr": 0.05}
    strong, weak, none = (code_recipe(**given, preview_guidance=scale) for scale in (50, 0.5, 1))
    for made in (strong, weak, none):
        for step in range(3):
            list(made.train_step([codes()], Clock(2, 4, images=2 * step)))
    guided = strong.preview(codes())
    assert guided.rows[2] == "the same with guidance=50"
    assert not torch.equal(*rows(guided)[1:])
    assert torch.equal(rows(guided)[1], rows(none.preview(codes()))[1])
    assert not torch.equal(rows(guided)[2], rows(weak.preview(codes()))[2])
    assert len(none.preview(codes()).rows) == 2


def test_previews_show_the_conditions_that_can_be_decoded(code_recipe: Make, vqgan: VQGAN) -> None:
    parts = {"condition": CodesCondition(vocabulary=24, grid=[2, 2])}
    made = code_recipe(parts=parts, vqgan=vqgan, condition_vqgan=vqgan)
    given = torch.randint(24, (2, 2, 2), generator=torch.Generator().manual_seed(1))
    drawn = made.preview(CodeBatch({**codes().columns, "cond": given}, torch.arange(2)))
    assert drawn.rows[:2] == ("conditions, decoded", "validation images, decoded")
    small = to_uint8(vqgan.decode_codes(given))  # 4 x 4 pixels, of images of 6 x 8
    assert torch.equal(rows(drawn)[0][:, 0, :8:2], small[0][:, 0])
    assert torch.equal(rows(drawn)[1], image_grid(to_uint8(vqgan.decode_codes(codes().codes)), 2))


def test_dropped_conditions_are_the_null_prefix_which_learns(code_recipe: Make) -> None:
    made = code_recipe(condition_dropout=0.5, accumulation=4)
    null = made.network.null_emb.detach().clone()
    batches = [codes(seed) for seed in range(4)]
    clock = Clock(8, 4)
    dropped = made._draws(clock)["dropped"]
    assert 0 < int(dropped.sum()) < 8
    list(made.train_step(batches, clock))
    assert not torch.equal(made.network.null_emb, null)
    learned = made.transformer.gradients["tok_emb.weight"]
    assert made.transformer.gradients["null_emb"].abs().max() > 0
    seen = torch.cat([batch.columns["cls"] for batch in batches])[~dropped]
    assert learned[seen].abs().sum(1).min() > 0
    untouched = code_recipe(condition_dropout=0.5, accumulation=4)
    untouched.loss.condition_dropout = 0.0
    list(untouched.train_step(batches, clock))
    assert untouched.transformer.gradients["null_emb"].abs().max() == 0


def test_training_and_validation_log_the_same_names(code_recipe: Make) -> None:
    made = code_recipe(image_size=8)
    (scalars,) = made.train_step([codes()], Clock(2, 4))
    assert scalars.keys() == {"loss", "nll"}
    found = made.validate([(codes(), True)])
    assert {"nll", "accuracy", "bits_per_dim", "nll_by_position"} < found.keys()
    assert found["bits_per_dim"] == pytest.approx(12 * found["nll"] / math.log(2) / (3 * 8 * 8))
