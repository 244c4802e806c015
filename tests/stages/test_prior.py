"""Stage 2 on one process: what a step learns, what validation measures, previews and the export."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from taming_dist.data.codes import CodeBatch
from taming_dist.models.prior.transformer import Transformer
from taming_dist.models.quantizers import VectorQuantizerConfig
from taming_dist.models.vqgan import VQGAN, VQGANConfig
from taming_dist.training.clock import Clock

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
    made.export(tmp_path / "export")
    loaded = Transformer.from_pretrained(tmp_path / "export")
    expected = made.transformer.module.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())


def test_previews_are_samples_from_the_same_random_numbers_every_time(code_recipe: Make) -> None:
    assert code_recipe().preview(codes()) is None
    quantizer = VectorQuantizerConfig(codes=24, dim=4)
    sizes = {"channels": 32, "multipliers": [1, 1], "blocks": 1, "latent_channels": 4}
    vqgan = VQGAN(VQGANConfig(quantizer, resolution=8, attention_resolutions=[], **sizes))
    made = code_recipe(lr=0.1, vqgan=vqgan.eval())
    drawn = made.preview(codes())
    assert drawn.dtype == torch.uint8
    assert drawn.shape == (3, 6, 2 * 8 + 2)
    assert torch.equal(drawn, made.preview(codes()))
    list(made.train_step([codes()], Clock(2, 4)))
    assert not torch.equal(drawn, made.preview(codes()))
