"""Tokenizers that LlamaGen and MaskGIT have published, imported from files of their layouts, give
the codes and pictures that the plain networks of tests/models/networks/published.py give."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from taming_dist import VQGAN
from taming_dist.errors import UserError
from taming_dist.models.networks import MaskGITConfig
from tests.models.networks.published import LlamaGen, MaskGIT
from tests.tools.conftest import describe

Convert = Callable[..., str]


def drawn(network: nn.Module) -> nn.Module:
    """Far from first values, so that no part of it could be left out unnoticed."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    return network.eval()


def maskgit() -> nn.Module:
    return drawn(MaskGIT(ch=32, mult=(1, 2, 2), blocks=2, z=6, codes=40))


def llamagen() -> nn.Module:
    return drawn(LlamaGen(ch=32, mult=(1, 2, 1), blocks=1, z=8, codes=40, dim=4))


def images() -> torch.Tensor:
    """In [-1,1]; not square, and with edges that the padding shows at."""
    return torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_maskgits_tokenizer_gives_the_same_codes_and_pictures(
    convert: Convert, tmp_path: Path
) -> None:
    theirs = maskgit()
    said = convert(theirs.state_dict())
    assert "MaskGITConfig" in said
    ours, x = VQGAN.from_pretrained(tmp_path / "out"), images()
    config = ours.config
    assert isinstance(config, MaskGITConfig)
    assert (config.factor, config.vocabulary, config.quantizer.dim) == (4, 40, 6)
    assert (list(config.multipliers), config.blocks) == ([1, 2, 2], 2)
    with torch.no_grad():
        codes = theirs.encode((x + 1) / 2)
        assert len(codes.unique()) > 5
        assert torch.equal(ours.encode(x), codes)
        pictures = 2 * theirs.decode(codes) - 1
        torch.testing.assert_close(ours.decode_codes(codes), pictures, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("within", ["model", "ema"])
def test_llamagens_tokenizer_gives_the_same_codes_and_pictures(
    convert_whole: Convert, tmp_path: Path, within: str
) -> None:
    theirs = llamagen()
    state = theirs.state_dict()
    beside = {name: 0 * value for name, value in state.items()} if within == "ema" else state
    said = convert_whole({"model": beside, within: state, "steps": 7})
    assert "1 tensors quantize.codebook_used*" in said
    ours, x = VQGAN.from_pretrained(tmp_path / "out"), images()
    assert ours.config.quantizer.normalized
    assert not ours.config.quantizer.legacy
    assert list(ours.config.attention_resolutions) == [64]
    with torch.no_grad():
        codes = theirs.encode(x)
        assert len(codes.unique()) > 5
        assert torch.equal(ours.encode(x), codes)
        pictures = theirs.decode(codes)
        torch.testing.assert_close(ours.decode_codes(codes), pictures, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("make", [maskgit, llamagen])
def test_what_is_missing_or_unknown_is_named(
    convert: Convert, tmp_path: Path, make: Callable[[], nn.Module]
) -> None:
    state = make().state_dict()
    lacking = {name: value for name, value in state.items() if name != "decoder.norm_out.bias"}
    with pytest.raises(UserError, match=r"decoder\.norm_out\.bias"):
        convert(lacking)
    with pytest.raises(UserError, match=r"encoder\.mid\.7\.bias"):
        convert(state | {"encoder.mid.7.bias": torch.zeros(1)})
    with pytest.raises(UserError, match="omit --config"):
        convert(state, "--config", describe(tmp_path, {"n_embed": 40}))
    assert not (tmp_path / "out").exists()
