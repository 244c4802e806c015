"""By what the best model is chosen: which metric, in which direction, and what is refused."""

import math
from collections.abc import Callable

import pytest
import torch

from taming_dist.errors import UserError
from taming_dist.evaluation.label_maps import LabelMapMetrics
from taming_dist.evaluation.reconstruction import ReconstructionMetrics
from taming_dist.stages import stage_of
from taming_dist.stages.interface import Config
from taming_dist.training.best import Best, Criterion

Compose = Callable[..., Config]
STAGE_1 = ("+experiment=flickr", "+scale=laptop")
STAGE_2 = ("+experiment=flickr_transformer", "+scale=laptop")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (STAGE_1, None),
        ((*STAGE_1, "train.best=val/lpips", "train.patience=3"), Criterion("val/lpips")),
        ((*STAGE_1, "train.best=val/psnr"), Criterion("val/psnr", higher=True)),
        (STAGE_2, Criterion("val/nll")),
        ((*STAGE_2, "model/scheme=masked"), Criterion("val/masked_nll")),
        ((*STAGE_2, "train.best=val/accuracy"), Criterion("val/accuracy", higher=True)),
        ((*STAGE_2, "train.best=null"), None),
    ],
)
def test_the_likelihood_chooses_the_best_prior_unless_the_user_does(
    compose: Compose, overrides: tuple[str, ...], expected: Criterion | None
) -> None:
    config = compose(*overrides)
    assert stage_of(config).criterion(config) == expected


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ((*STAGE_2, "train.best=val/nlll"), r"train\.best=val/nlll: use auto, null, or one of val"),
        ((*STAGE_2, "train.best=train/nll"), r"train\.best=train/nll: use auto, null, or one of"),
        ((*STAGE_1, "train.patience=2"), r"train\.patience=2 needs a metric .*: give train\.best,"),
    ],
)
def test_a_metric_that_there_is_not_is_refused_before_anything_starts(
    compose: Compose, overrides: tuple[str, ...], said: str
) -> None:
    config = compose(*overrides)
    with pytest.raises(UserError, match=said):
        stage_of(config).criterion(config)


def test_first_stages_measure_what_they_can_be_compared_by() -> None:
    images, codes = torch.rand(2, 3, 4, 4), torch.zeros(2, 2, 2, dtype=torch.int64)
    for metrics in (ReconstructionMetrics(4), LabelMapMetrics(3, 4)):
        metrics.update(images, images, codes)
        names = {name.removeprefix("val_") for name in metrics.compute()}
        assert set(metrics.higher_is_better) - {"lpips"} <= names


def test_a_value_that_is_no_number_is_never_the_best() -> None:
    best = Best().after(Criterion("val/nll"), 4, math.nan)
    assert best.value is None
    best = best.after(Criterion("val/nll"), 8, 2.0).after(Criterion("val/nll"), 12, math.nan)
    assert (best.value, best.images, best.newest, best.since) == (2.0, 8, 12, 1)
    assert Best(**best.state()) == best
