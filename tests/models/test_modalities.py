"""What a first stage encodes: bytes to inputs, outputs to colours."""

from typing import Any

import pytest
import torch
from torch import Tensor

from taming_dist.data.images import COLUMNS
from taming_dist.errors import UserError
from taming_dist.models.modalities import (
    MODALITIES,
    RGB,
    Depth,
    Edges,
    LabelMap,
    LowResolution,
    palette,
)
from taming_dist.models.quantizers import VectorQuantizerConfig
from taming_dist.models.vqgan import VQGAN, VQGANConfig
from tests.tiny_models import tiny_config


def test_photographs_span_minus_one_to_one() -> None:
    images = torch.tensor([0, 255], dtype=torch.uint8).expand(1, 3, 1, 2)
    assert RGB().tensor(images)[0, 0, 0].tolist() == [-1.0, 1.0]


def test_inputs_are_contiguous_whatever_the_layout_of_the_images() -> None:
    images = torch.zeros(2, 4, 4, 3, dtype=torch.uint8).permute(0, 3, 1, 2)
    assert RGB().tensor(images).is_contiguous()


@pytest.mark.parametrize(
    ("modality", "column"),
    [(Depth(), torch.tensor([0.0, 1.0])), (Edges(), torch.tensor([0, 255], dtype=torch.uint8))],
    ids=["depth", "edges"],
)
def test_depth_and_edges_span_minus_one_to_one_and_are_shown_in_grey(
    modality: Any, column: Tensor
) -> None:
    planes = modality.tensor(column.reshape(1, 1, 2))
    assert planes.shape == (1, 1, 1, 2)
    assert planes.flatten().tolist() == [-1.0, 1.0]
    shown = modality.picture(planes)
    assert shown.shape == (1, 3, 1, 2)
    assert torch.equal(shown[:, 0], shown[:, 2])


@pytest.mark.parametrize("modality", MODALITIES.values())
def test_every_modality_reads_a_column_that_exists(modality: Any) -> None:
    assert modality.column in COLUMNS


def test_a_label_map_is_one_channel_per_class_and_comes_back_in_its_colours() -> None:
    labels = torch.tensor([[[0, 2], [1, 1]]], dtype=torch.uint8)
    modality = LabelMap(3)
    planes = modality.tensor(labels)
    assert planes.shape == (1, 3, 2, 2)
    assert planes.dtype == torch.float32
    assert torch.equal(planes.argmax(1), labels.long())
    assert torch.equal(planes.sum(1), torch.ones(1, 2, 2))
    shown = modality.picture(planes)
    assert torch.equal(shown[0, :, 0, 1], palette(3)[2])


def test_no_two_classes_share_a_colour() -> None:
    colours = palette(256)
    assert float(colours.min()) >= -1
    assert float(colours.max()) <= 1
    assert len(torch.unique(colours, dim=0)) == 256


def test_a_class_that_does_not_exist_is_a_users_mistake() -> None:
    columns = {"seg.png": torch.tensor([[[0, 11]]], dtype=torch.uint8)}
    here = torch.device("cpu")
    assert LabelMap(12).take(columns, here).equal(columns["seg.png"])
    with pytest.raises(UserError, match=r"modality\.classes=11, .* class 11: set it to 12 or more"):
        LabelMap(11).take(columns, here)


@pytest.mark.parametrize("classes", [1, 257])
def test_numbers_of_classes_that_no_byte_can_hold_are_refused(classes: int) -> None:
    with pytest.raises(UserError, match=r"modality\.classes"):
        LabelMap(classes)


@pytest.mark.parametrize("modality", [RGB(), Depth(), LabelMap(7), Edges(), LowResolution()])
def test_a_first_stage_of_any_modality_survives_its_export(modality: Any, tmp_path: Any) -> None:
    config = tiny_config(
        VectorQuantizerConfig(codes=8, dim=4), 16, latent_channels=8, modality=modality
    )
    model = VQGAN(config).eval()
    model.save_pretrained(tmp_path)
    back = VQGAN.from_pretrained(tmp_path)
    assert back.config.modality == modality
    assert back.fingerprint == model.fingerprint
    with torch.no_grad():
        decoded = back.decode_codes(back.encode(torch.randn(1, modality.channels, 16, 16)))
    assert decoded.shape == (1, modality.channels, 16, 16)


def test_an_unknown_modality_is_refused() -> None:
    values: Any = {"name": "sound"}
    with pytest.raises(UserError, match=r"model/modality=sound: use one of rgb, labels"):
        VQGANConfig(modality=values)
