"""The VQGAN as its users call it: codes, images, sizes, precision, and what training gets of it."""

from typing import Any

import pytest
import torch

from taming_dist.errors import UserError
from taming_dist.models.quantizers import EMAQuantizerConfig, VectorQuantizerConfig
from taming_dist.models.vqgan import VQGAN, VQGANConfig
from tests.tiny_models import tiny_config


def tiny(**settings: Any) -> VQGANConfig:
    defaults: dict[str, Any] = {
        "quantizer": VectorQuantizerConfig(codes=20, dim=4),
        "resolution": 16,
        "multipliers": [1, 1, 1],
        "latent_channels": 8,
    }
    return tiny_config(**defaults | settings)


def images(b: int = 2, height: int = 16, width: int = 16) -> torch.Tensor:
    return torch.rand(b, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize(
    "quantizer",
    [
        VectorQuantizerConfig(codes=20, dim=4),
        EMAQuantizerConfig(codes=20, dim=4),
    ],
)
def test_decoding_the_codes_of_images_gives_their_reconstruction(quantizer: object) -> None:
    torch.manual_seed(0)
    model = VQGAN(tiny(quantizer=quantizer)).eval()
    with torch.no_grad():
        out = model(images(height=16, width=24))
        codes = model.encode(images(height=16, width=24))
        decoded = model.decode_codes(codes)
    assert codes.dtype == torch.int64
    assert codes.shape == (2, 4, 6)
    assert torch.equal(codes, out.codes)
    torch.testing.assert_close(decoded, out.images)


def test_encoding_keeps_nothing_for_a_backward_pass() -> None:
    def refuse(tensor: torch.Tensor) -> torch.Tensor:
        raise AssertionError(f"{tuple(tensor.shape)} is kept")

    with torch.autograd.graph.saved_tensors_hooks(refuse, refuse):
        VQGAN(tiny()).encode(images())


def test_a_bf16_model_encodes_and_decodes() -> None:
    torch.manual_seed(0)
    model = VQGAN(tiny()).eval().to(torch.bfloat16)
    with torch.no_grad():
        codes = model.encode(images())
        assert model.decode_codes(codes).dtype == torch.bfloat16
    assert codes.shape == (2, 4, 4)


def test_features_carry_no_gradient_and_images_do() -> None:
    out = VQGAN(tiny())(images())
    assert not out.features.requires_grad
    assert out.images.requires_grad
    assert out.codebook_loss.requires_grad


def test_every_parameter_gets_a_gradient() -> None:
    torch.manual_seed(0)
    model = VQGAN(tiny())
    out = model(images())
    (out.images.sum() + out.codebook_loss).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize(("height", "width", "name"), [(18, 16, "height"), (16, 15, "width")])
def test_images_that_do_not_halve_are_the_users_mistake(height: int, width: int, name: str) -> None:
    with pytest.raises(UserError, match=f"image {name}=1[58].* use a multiple of 4"):
        VQGAN(tiny()).encode(images(height=height, width=width))


def test_config_values_that_cannot_work_are_the_users_mistake() -> None:
    with pytest.raises(UserError, match=r"model\.channels=48: use a multiple of 32"):
        tiny(channels=48)
    with pytest.raises(UserError, match=r"model\.resolution=18.*multiple of 4"):
        tiny(resolution=18)


def test_factor_and_vocabulary_follow_from_the_configuration() -> None:
    assert tiny().factor == 4
    assert tiny().vocabulary == 20


@pytest.mark.parametrize("kind", [VectorQuantizerConfig, EMAQuantizerConfig])
def test_a_model_cast_to_bf16_keeps_its_codebook_and_encodes_and_decodes(kind: type) -> None:
    torch.manual_seed(0)
    model = VQGAN(tiny(quantizer=kind(codes=64, dim=8))).eval()
    with torch.no_grad():
        codes = model.encode(images())
        entries = model.quantize.lookup(codes)
        model.to(torch.bfloat16)
        assert torch.equal(model.quantize.lookup(codes), entries)
        # rounding in the encoder may move a vector over a border, but not most of them
        assert (model.encode(images()) == codes).float().mean() > 0.5
        assert model.decode_codes(codes).dtype == torch.bfloat16
