"""The first stage of label maps: its loss and gradients, what it measures and shows."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from taming_dist.errors import UserError
from taming_dist.models.modalities import palette
from taming_dist.training.clock import Clock

Make = Callable[..., Any]


@dataclass
class Labels:
    """A batch as far as this stage reads it."""

    segmentations: Tensor

    def __len__(self) -> int:
        return len(self.segmentations)

    @property
    def columns(self) -> dict[str, Tensor]:
        return {"seg.png": self.segmentations}


def blocky(count: int = 2, seed: int = 0) -> Labels:
    """Label maps of 8 x 8 squares."""
    randomness = torch.Generator().manual_seed(seed)
    squares = torch.randint(5, (count, 4, 4), generator=randomness, dtype=torch.uint8)
    return Labels(squares.repeat_interleave(8, 1).repeat_interleave(8, 2))


def step(recipe: Any, *batches: Labels, at: int = 0) -> list[dict[str, Tensor]]:
    size = 2 * len(batches)
    return list(recipe.train_step(batches, Clock(size, 100, images=at * size)))


def test_the_loss_is_the_cross_entropy_of_every_channel_and_the_codebooks(
    label_recipe: Make,
) -> None:
    recipe = label_recipe(codebook_weight=0.5)
    labels = torch.nn.functional.one_hot(blocky().segmentations.long(), 5).movedim(-1, 1).float()
    out = recipe.generator.module(labels)
    probability = out.images.sigmoid()
    obvious = -(labels * probability.log() + (1 - labels) * (1 - probability).log()).mean()
    (obvious + 0.5 * out.codebook_loss).backward()
    expected = {
        name: p.grad.clone()
        for name, p in recipe.generator.module.named_parameters()
        if p.grad is not None
    }
    recipe.generator.module.zero_grad()
    (scalars,) = step(recipe, blocky())
    assert float(scalars["bce"]) == pytest.approx(float(obvious), rel=1e-5)
    total = float(obvious + 0.5 * out.codebook_loss)
    assert float(scalars["loss"]) == pytest.approx(total, rel=1e-5)
    assert recipe.generator.gradients.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.allclose(recipe.generator.gradients[name], value, atol=1e-6), name


def test_the_network_runs_once_for_each_micro_batch_and_has_no_adversary(
    label_recipe: Make,
) -> None:
    recipe = label_recipe(accumulation=2)
    parts = step(recipe, blocky(seed=1), blocky(seed=2))
    assert len(parts) == 2
    engine = recipe.generator
    assert (engine.calls, engine.backwards, engine.steps) == (2, 2, 1)
    assert recipe.engines.keys() == {"generator"}


@pytest.mark.slow
def test_it_learns_the_label_maps(label_recipe: Make) -> None:
    recipe = label_recipe(lr=2e-3)
    batch = blocky()
    figures = [recipe.validate([(batch, True)])]
    for at in range(60):
        step(recipe, batch, at=at)
    figures.append(recipe.validate([(batch, True)]))
    assert figures[1]["bce"] < 0.5 * figures[0]["bce"]
    assert figures[1]["pixel_accuracy"] > max(0.5, figures[0]["pixel_accuracy"])


def test_the_preview_has_the_maps_in_colours_above_and_their_reconstructions_below(
    label_recipe: Make,
) -> None:
    recipe, batch = label_recipe(), blocky()
    sheet = recipe.preview(batch).picture
    assert sheet.shape == (3, 2 * 32 + 2, 2 * 32 + 2)
    first = int(batch.segmentations[0, 0, 0])
    expected = ((palette(5)[first] + 1) * 127.5).round().byte()
    assert torch.equal(sheet[:, 0, 0], expected)


def test_a_class_beyond_those_of_the_model_ends_the_step_in_one_line(label_recipe: Make) -> None:
    batch = blocky()
    batch.segmentations[0, 0, 0] = 9
    with pytest.raises(UserError, match=r"model\.modality\.classes=5, .* set it to 10 or more"):
        step(label_recipe(), batch)
