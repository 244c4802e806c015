"""Figures of label maps against counting by hand."""

import math

import pytest
import torch
import torch.nn.functional as F

from taming_dist.evaluation.label_maps import LabelMapMetrics

TRUTH = torch.tensor([[[0, 0], [1, 2]], [[2, 2], [2, 0]]])
TAKEN = torch.tensor([[[0, 1], [1, 2]], [[2, 0], [2, 0]]])


def one_hot(labels: torch.Tensor) -> torch.Tensor:
    return F.one_hot(labels, 4).movedim(-1, 1).float()


def test_figures_equal_counting_by_hand_however_the_set_is_cut() -> None:
    logits = 6 * one_hot(TAKEN) - 3
    codes = torch.tensor([[[0, 1]], [[1, 1]]])
    whole = LabelMapMetrics(4, 3)
    whole.update(one_hot(TRUTH), logits, codes)
    parts = LabelMapMetrics(4, 3)
    for row in range(2):
        part = slice(row, row + 1)
        parts.update(one_hot(TRUTH)[part], logits[part], codes[part])
    figures = whole.compute()
    assert figures == pytest.approx(parts.compute())
    assert figures["val_pixel_accuracy"] == pytest.approx(6 / 8)
    # classes 0: 2 of 4, 1: 1 of 2, 2: 3 of 4; class 3 never occurs and is never taken
    assert figures["val_mean_iou"] == pytest.approx((2 / 4 + 1 / 2 + 3 / 4) / 3)
    right, wrong = -math.log(torch.sigmoid(torch.tensor(3.0))), 3 + math.log1p(math.exp(-3))
    assert figures["val_bce"] == pytest.approx((28 * right + 4 * wrong) / 32, rel=1e-5)
    assert figures["codebook_usage"] == pytest.approx(2 / 3)
