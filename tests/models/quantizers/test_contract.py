"""What every quantizer promises, whatever its maths: shapes, codes, precision, exports."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from taming_dist.errors import UserError
from taming_dist.models.quantizers import (
    NO_CODE,
    VARIANTS,
    BSQuantizerConfig,
    EMAQuantizerConfig,
    FSQuantizerConfig,
    GumbelQuantizerConfig,
    IndexQuantizerConfig,
    LFQuantizerConfig,
    MultiScaleConfig,
    ProductQuantizerConfig,
    ResidualQuantizerConfig,
    SimVQConfig,
    VectorQuantizerConfig,
    build_quantizer,
)
from taming_dist.models.vqgan import VQGAN, VQGANConfig
from tests.tiny_models import tiny_config

CONFIGS = {
    "vector": VectorQuantizerConfig(codes=12, dim=4),
    "normalized": VectorQuantizerConfig(codes=12, dim=4, normalized=True),
    "restarted": VectorQuantizerConfig(codes=12, dim=4, initial="kmeans", revive_below=0.1),
    "ema": EMAQuantizerConfig(codes=12, dim=4),
    "gumbel": GumbelQuantizerConfig(codes=12, dim=4),
    "fsq": FSQuantizerConfig(levels=[4, 3, 2]),
    "lfq": LFQuantizerConfig(bits=4),
    "bsq": BSQuantizerConfig(bits=4),
    "ibq": IndexQuantizerConfig(codes=12, dim=4),
    "simvq": SimVQConfig(codes=12, dim=4),
    "multiscale": MultiScaleConfig(codes=12, dim=4, scales=[1, 2, 4]),
    "multiscale, restarted": MultiScaleConfig(
        codes=12, dim=4, scales=[1, 4], normalized=True, initial="data", revive_below=0.1
    ),
    "rotation": VectorQuantizerConfig(codes=12, dim=4, gradient="rotation"),
    "ema, rotation": EMAQuantizerConfig(codes=12, dim=4, gradient="rotation"),
    "product": ProductQuantizerConfig(codes=12, dim=4, tables=2),
    "product, restarted": ProductQuantizerConfig(
        codes=12, dim=6, tables=3, normalized=False, initial="kmeans", revive_below=0.1
    ),
    "residual": ResidualQuantizerConfig(codes=12, dim=4, depth=3),
    "residual, rotation": ResidualQuantizerConfig(codes=12, dim=4, depth=2, gradient="rotation"),
}
every = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())


def built(config: Any) -> Any:
    torch.manual_seed(0)
    return build_quantizer(config)


def grid(config: Any) -> tuple[int, int]:
    """That of latents: no square unless it has to be."""
    return (4, 4) if config.name == "multiscale" else (5, 6)


def latents(config: Any) -> Tensor:
    size = (3, config.dim, *grid(config))
    return torch.randn(size, generator=torch.Generator().manual_seed(1))


def test_every_variant_is_tried_here() -> None:
    assert {config.name for config in CONFIGS.values()} == VARIANTS.keys()


@every
def test_shapes_types_and_range_of_the_codes(config: Any) -> None:
    quantizer = built(config)
    assert (quantizer.vocabulary, quantizer.dim) == (config.codes, config.dim)
    z = latents(config)
    out = quantizer(z)
    assert out.z_q.shape == z.shape
    shape = config.code_shape(*grid(config))
    assert out.codes.shape == (3, *shape)
    assert config.latent_grid(shape) == grid(config)
    assert out.codes.dtype == torch.int64
    assert out.loss.shape == ()
    assert int(out.codes.min()) >= 0
    assert int(out.codes.max()) < config.codes
    assert out.statistics.counts.shape == (config.codes,)


@every
def test_chosen_entries_are_what_lookup_gives_for_the_codes(config: Any) -> None:
    for quantizer in (built(config), built(config).eval()):
        out = quantizer(latents(config))
        torch.testing.assert_close(quantizer.lookup(out.codes), out.z_q, atol=1e-6, rtol=1e-5)


@every
def test_encoding_gives_the_codes_of_evaluation_and_runs_no_forward(
    config: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantizer = built(config)
    z = latents(config).requires_grad_(True)
    expected = quantizer.eval()(z).codes
    quantizer.train()
    monkeypatch.setattr(type(quantizer), "forward", None)
    assert torch.equal(quantizer.encode(z), expected)


@every
def test_counts_are_how_often_each_code_occurs(config: Any) -> None:
    out = built(config)(latents(config))
    expected = [int((out.codes == code).sum()) for code in range(config.codes)]
    assert out.statistics.counts.tolist() == expected


@every
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_latent_that_is_not_finite_shows_in_the_reconstruction_and_nowhere_else(
    config: Any, value: float
) -> None:
    """In training, where the loss tells; its code stays inside of the vocabulary."""
    z = latents(config)
    z[1, 2, 3, 3] = value
    out = built(config)(z)
    assert out.codes.min() >= 0
    assert out.codes.max() < config.codes
    assert out.statistics.counts.sum() == out.codes.numel()
    finite = out.z_q.isfinite().all(1)
    assert not finite[1, 3, 3]
    assert finite.sum() == finite.numel() - 1


@every
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_latent_that_is_not_finite_has_no_code(config: Any, value: float) -> None:
    z, quantizer = latents(config), built(config).eval()
    expected = quantizer.encode(z)
    if expected.ndim == 2:  # of a sequence each code may be of every latent
        expected[1] = NO_CODE
    else:
        expected[1, ..., 3, 3] = NO_CODE
    z[1, 2, 3, 3] = value
    assert torch.equal(quantizer.encode(z), expected)


@every
def test_quantizers_compute_in_fp32_under_autocast(config: Any) -> None:
    quantizer = built(config).eval()
    expected = quantizer(latents(config))
    with torch.autocast("cpu", torch.bfloat16):
        out = quantizer(latents(config))
    assert out.z_q.dtype == torch.float32
    assert torch.equal(out.codes, expected.codes)
    assert torch.equal(out.loss, expected.loss)


@every
def test_casting_the_model_leaves_the_numbers_of_its_quantizer(config: Any) -> None:
    quantizer = built(config)
    torch.nn.Sequential(quantizer).to(torch.bfloat16)
    assert all(value.dtype != torch.bfloat16 for value in quantizer.state_dict().values())


@every
def test_a_gradient_reaches_the_latents_through_the_entries(config: Any) -> None:
    z = latents(config).requires_grad_(True)
    out = built(config)(z)
    (out.z_q * torch.randn(out.z_q.shape)).sum().backward()
    assert z.grad is not None
    assert float(z.grad.abs().sum()) > 0


@every
def test_evaluation_is_deterministic_and_gathers_nothing_for_updates(config: Any) -> None:
    quantizer = built(config).eval()
    first, second = (quantizer(latents(config)) for _ in range(2))
    assert torch.equal(first.codes, second.codes)
    assert first.statistics.sums is None
    assert first.statistics.candidates is None


def test_every_code_can_be_reached_by_its_own_entry() -> None:
    """Where the nearest entry is chosen; the others have a test of their own."""
    for name in ("vector", "normalized", "ema", "lfq", "bsq", "simvq"):
        quantizer = built(CONFIGS[name]).eval()
        codes = torch.arange(quantizer.vocabulary)[None, None]
        entries = quantizer.lookup(codes)
        assert torch.equal(quantizer(entries).codes, codes), name


@every
def test_a_vqgan_with_it_is_exported_and_tokenizes_alike(config: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = VQGAN(tiny_config(config, latent_channels=8)).eval()
    model.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())["quantizer"]
    before = {"gradient": "straight_through"}  # before there was another, nothing said so
    assert {**before, **written} == {**before, **dataclasses.asdict(config)}
    assert written.get("gradient") != "straight_through"
    assert VQGANConfig(quantizer=written, resolution=64).quantizer == config
    loaded = VQGAN.from_pretrained(tmp_path)
    assert loaded.fingerprint == model.fingerprint
    images = torch.rand(2, 3, 8, 8 if config.name == "multiscale" else 16) * 2 - 1
    with torch.no_grad():
        codes = loaded.encode(images)
        assert torch.equal(codes, model.encode(images))
        torch.testing.assert_close(loaded.decode_codes(codes), model(images).images)


def test_an_unknown_quantizer_is_the_users_mistake() -> None:
    values: Any = {"name": "foo"}
    with pytest.raises(UserError, match=r"model/quantizer=foo: use one of vector, ema, gumbel"):
        VQGANConfig(quantizer=values)


@pytest.mark.parametrize(
    ("kind", "settings", "line"),
    [
        (FSQuantizerConfig, {"levels": [8, 1]}, r"levels=\[8, 1\]: use one or more whole"),
        (FSQuantizerConfig, {"levels": []}, r"levels=\[\]: use one or more whole"),
        (LFQuantizerConfig, {"bits": 0}, "bits=0: use a whole number from 1 to 24"),
        (BSQuantizerConfig, {"bits": 25}, "bits=25: use a whole number from 1 to 24"),
        (SimVQConfig, {"codes": 0, "dim": 4}, "codes=0: use a whole number"),
        (
            ProductQuantizerConfig,
            {"codes": 12, "dim": 4, "tables": 3},
            "tables=3: dim=4 does not divide by it, use dim=6 or other tables",
        ),
        (
            ProductQuantizerConfig,
            {"codes": 13, "dim": 6, "tables": 3},
            "tables=3: codes=13 does not divide by it, use codes=15",
        ),
        (ProductQuantizerConfig, {"codes": 4, "dim": 2, "tables": 1}, "tables=1: use a whole"),
        (ResidualQuantizerConfig, {"codes": 4, "dim": 2, "depth": 1}, "depth=1: use a whole"),
        (
            VectorQuantizerConfig,
            {"codes": 4, "dim": 4, "gradient": "turned"},
            "gradient=turned: use straight_through or rotation",
        ),
        (
            LFQuantizerConfig,
            {"bits": 4, "temperature": 0.0},
            "temperature=0.0: use a number",
        ),
        (IndexQuantizerConfig, {"codes": 4, "dim": 2, "temperature": 0.0}, "temperature=0.0"),
        (GumbelQuantizerConfig, {"codes": 4, "dim": 2, "final_temperature": 0.0}, "final_temp"),
        (VectorQuantizerConfig, {"codes": 4, "dim": 2, "initial": "pca"}, "initial=pca: use one"),
        (
            EMAQuantizerConfig,
            {"codes": 4, "dim": 2, "revive_below": 1.0},
            "revive_below=1.0: use a number",
        ),
    ],
)
def test_settings_that_cannot_be_meant_are_the_users_mistake(
    kind: Any, settings: dict[str, Any], line: str
) -> None:
    with pytest.raises(UserError, match=rf"model\.quantizer\.{line}"):
        kind(**settings)
