"""Vision transformers as E and G, beside a slow, obvious form and as users of a VQGAN call them."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from taming_dist.errors import UserError
from taming_dist.generation.tiles import decode_pictures
from taming_dist.models.autoencoder import last_layer_gradients
from taming_dist.models.networks import MaskGITConfig, ViTConfig
from taming_dist.models.networks.vit import Blocks, ViTDecoder, ViTEncoder
from taming_dist.models.quantizers import FSQuantizerConfig, VectorQuantizerConfig
from taming_dist.models.vqgan import VQGAN
from tests.tiny_models import tiny_config


def config(**settings: Any) -> ViTConfig:
    sizes: dict[str, Any] = {"patch": 4, "width": 16, "depth": 2, "heads": 2, "registers": 3}
    quantizer = VectorQuantizerConfig(codes=20, dim=4, normalized=True)
    return ViTConfig(**{"quantizer": quantizer, "resolution": 16, **sizes, **settings})


def moved(network: Any) -> Any:
    """Away from the first values, where some things are zero."""
    randomness = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=randomness) * 0.2)
    return network


def images(height: int = 16, width: int = 24) -> Tensor:
    shape = (2, 3, height, width)
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight


def turned(x: Tensor, place: tuple[int, int] | None) -> Tensor:
    """Queries or keys [heads,d] of one token: of the d/2 planes half are turned by its row, half by
    its column; registers are not turned."""
    if place is None:
        return x
    planes = x.shape[-1] // 2
    of_each = [(place[n // (planes // 2)], n % (planes // 2)) for n in range(planes)]
    angles = torch.tensor([where / 10_000 ** (n / (planes // 2)) for where, n in of_each])
    pairs = torch.complex(*x.split(planes, -1)) * torch.polar(torch.ones(planes), angles)
    return torch.cat([pairs.real, pairs.imag], -1)


def slowly(body: Blocks, tokens: Tensor, columns: int) -> Tensor:
    """`Blocks` of one image, [n,c], token by token."""
    assert body.registers is not None
    x = torch.cat([body.registers, tokens])
    places = [None] * len(body.registers) + [divmod(n, columns) for n in range(len(tokens))]
    for block in body.blocks:
        attention, mlp = block.attn, block.mlp
        heads = [F.linear(rms(t, block.ln1.weight), attention.qkv.weight) for t in x]
        queries, keys, values = zip(
            *(row.view(3, attention.heads, -1).unbind() for row in heads), strict=True
        )
        queries = [rms(q, attention.query_norm.weight) for q in queries]
        keys = [rms(k, attention.key_norm.weight) for k in keys]
        queries = [turned(q, place) for q, place in zip(queries, places, strict=True)]
        keys = [turned(k, place) for k, place in zip(keys, places, strict=True)]
        read = []
        for query in queries:
            scores = torch.stack([(query * key).sum(-1) for key in keys]) / math.sqrt(
                query.shape[-1]
            )
            seen = (scores.softmax(0).unsqueeze(-1) * torch.stack(values)).sum(0)
            read.append(F.linear(seen.flatten(), attention.proj.weight))
        x = x + torch.stack(read)
        gate, up = F.linear(rms(x, block.ln2.weight), mlp.gate_up.weight).chunk(2, -1)
        x = x + F.linear(F.silu(gate) * up, mlp.down.weight)
    return rms(x[len(body.registers) :], body.norm.weight)


@torch.no_grad()
def test_encoder_and_decoder_are_the_slow_obvious_ones() -> None:
    encoder, decoder = moved(ViTEncoder(config())), moved(ViTDecoder(config()))
    x, p, (rows, columns) = images(), 4, (4, 6)
    patches = [
        x[0, :, p * i : p * i + p, p * j : p * j + p].movedim(0, -1).flatten()
        for i in range(rows)
        for j in range(columns)
    ]
    tokens = slowly(encoder.body, encoder.patches(torch.stack(patches)), columns)
    found = encoder(x)
    assert found.shape == (2, 16, rows, columns)
    torch.testing.assert_close(found[0].flatten(1).T, tokens, atol=1e-5, rtol=1e-5)

    pixels = decoder.pixels(slowly(decoder.body, tokens, columns))
    expected = torch.zeros(3, 16, 24)
    for n, patch in enumerate(pixels):
        i, j = divmod(n, columns)
        expected[:, p * i : p * i + p, p * j : p * j + p] = patch.view(p, p, 3).movedim(-1, 0)
    torch.testing.assert_close(decoder.features(found)[0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("registers", [0, 3])
def test_images_become_codes_and_these_their_reconstruction(registers: int) -> None:
    model = moved(VQGAN(config(registers=registers))).eval()
    out = model(images())
    codes = model.encode(images())
    assert codes.shape == (2, 4, 6)
    assert len(codes.unique()) > 2
    assert torch.equal(codes, out.codes)
    torch.testing.assert_close(model.decode_codes(codes), out.images, atol=1e-5, rtol=1e-5)
    (out.images.square().sum() + out.codebook_loss).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_any_quantizer_and_half_precision_go_with_them() -> None:
    model = VQGAN(config(quantizer=FSQuantizerConfig(levels=[5, 3]))).eval()
    whole = model.decode_codes(model.encode(images()))
    half = model.to(torch.bfloat16)
    found = half.decode_codes(half.encode(images()))
    assert found.dtype == torch.bfloat16
    assert found.shape == whole.shape


def test_under_autocast_blocks_add_up_in_full_precision() -> None:
    encoder = ViTEncoder(config())
    seen = []
    encoder.body.blocks[1].register_forward_hook(lambda _, __, out: seen.append(out.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        encoder(images())
    assert seen == [torch.float32]


def test_the_last_layers_gradients_for_the_adaptive_weight_are_autograds() -> None:
    decoder = moved(ViTDecoder(config()))
    z = torch.randn(2, 16, 3, 2, generator=torch.Generator().manual_seed(1))
    features = decoder.features(z)
    made = decoder.conv_out(features)
    leaf = made.detach().requires_grad_(True)
    (at_image,) = torch.autograd.grad(leaf.pow(4).mean(), leaf)
    (expected,) = torch.autograd.grad(made.pow(4).mean(), decoder.conv_out.weight)
    (found,) = last_layer_gradients(features.detach(), [at_image])
    torch.testing.assert_close(found, expected, atol=1e-8, rtol=1e-4)


def test_it_starts_with_patches_as_they_are() -> None:
    decoder = ViTDecoder(config())
    z = torch.randn(1, 16, 2, 2)
    assert torch.equal(decoder(z), decoder.features(z))


@pytest.mark.parametrize("made", [config(), MaskGITConfig(config().quantizer, 16, channels=32)])
def test_an_export_is_of_the_networks_that_it_was_trained_with(made: Any, tmp_path: Path) -> None:
    model = VQGAN(made)
    model.save_pretrained(tmp_path)
    back = VQGAN.from_pretrained(tmp_path)
    assert back.config == made
    assert back.fingerprint == model.fingerprint
    assert "name" not in VQGAN(tiny_config(made.quantizer)).canonical_config()


def test_what_cannot_work_is_the_users_mistake() -> None:
    with pytest.raises(UserError, match=r"model\.resolution=18: .* 4 x 4 pixels, so use a multipl"):
        config(resolution=18)
    with pytest.raises(UserError, match=r"image width=18: .* use a multiple of 4"):
        VQGAN(config()).encode(images(width=18))
    with pytest.raises(UserError, match=r"model\.heads=3: width=16 .* a multiple of 12"):
        config(heads=3)
    with pytest.raises(UserError, match=r"model\.name=maskgit: it is vit here"):
        config(name="maskgit")


def test_a_picture_is_decoded_whole_or_not_at_all() -> None:
    model = moved(VQGAN(config())).eval()
    codes = torch.arange(12).view(1, 3, 4)
    with torch.no_grad():
        expected = model.decode_codes(codes).clamp(-1, 1)
    assert torch.equal(decode_pictures(model, codes), expected)
    with pytest.raises(UserError, match=r"tile=4: the decoder of model=vit has to see the whole"):
        decode_pictures(model, codes, tile=4)
