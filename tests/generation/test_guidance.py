"""Guidance against its formula, for both schemes, with and without a cache."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from taming_dist.errors import UserError
from taming_dist.generation.draws import uniforms
from taming_dist.generation.generator import Generator, generate_codes
from taming_dist.generation.guidance import guided
from taming_dist.generation.sampling import Sampling
from taming_dist.models.prior.conditions import ClassCondition
from taming_dist.models.prior.prefix import Prefix
from taming_dist.models.prior.transformer import Transformer, TransformerConfig
from taming_dist.models.quantizers import VectorQuantizerConfig
from taming_dist.models.vqgan import VQGAN
from tests.engine.waiting import Waiting
from tests.tiny_models import tiny_config

CLASSES = {"cls": torch.tensor([0, 3, 4])}
TOKENS = torch.randint(24, (3, 12), generator=torch.Generator().manual_seed(1))
SCHEMES = pytest.mark.parametrize("scheme", ["next_index", "masked"])


def tiny(scheme: str, **settings: Any) -> Transformer:
    """A transformer whose logits depend much on the class."""
    torch.manual_seed(0)
    config = TransformerConfig(
        24,
        [3, 4],
        layers=2,
        heads=2,
        width=16,
        condition=ClassCondition(5),
        scheme=scheme,
        **{"null_prefix": True} | settings,
    )
    model = Transformer(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.5)
    return model


def vqgan() -> VQGAN:
    quantizer = VectorQuantizerConfig(codes=24, dim=4)
    return VQGAN(tiny_config(quantizer)).eval()


def formula(model: Transformer, tokens: Tensor, prefix: Prefix, scale: float) -> Tensor:
    """Each half alone."""
    conditional = model(tokens, prefix)
    null = model(tokens, prefix.dropping(torch.ones(len(prefix), dtype=torch.bool)))
    assert (conditional - null).abs().max() > 0.1
    return (1 - scale) * null + scale * conditional


@SCHEMES
@pytest.mark.parametrize("scale", [0.0, 1.0, 3.5])
@torch.no_grad()
def test_guided_logits_of_all_tokens_are_those_of_the_formula(scheme: str, scale: float) -> None:
    model = tiny(scheme)
    prefix = model.condition.prefix(3, CLASSES)
    found = Sampling(guidance=scale).network(model)(TOKENS, prefix)
    torch.testing.assert_close(found, formula(model, TOKENS, prefix, scale), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_guided_logits_with_the_cache_are_those_of_the_formula() -> None:
    model = tiny("next_index")
    prefix = model.condition.prefix(3, CLASSES)
    network = Sampling(guidance=2.0).network(model)
    first, cache = network.begin(prefix)
    steps = [first] + [network.step(TOKENS[:, k : k + 1], cache) for k in range(11)]
    expected = formula(model, TOKENS, prefix, 2.0)
    torch.testing.assert_close(torch.stack(steps, 1), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_schedules_have_the_scales_of_their_formulas(schedule: str) -> None:
    sampling = Sampling(guidance=5.0, guidance_schedule=schedule, guidance_power=2.0)
    expected = {
        "constant": [5.0] * 4,
        "linear": [1 + 4 * k / 4 for k in range(4)],
        "cosine": [1 + 4 * (1 - math.cos(math.pi * (k / 4) ** 2)) / 2 for k in range(4)],
    }[schedule]
    assert sampling.guidance_scales(4).tolist() == pytest.approx(expected)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@torch.no_grad()
def test_each_position_has_the_scale_of_the_schedule(schedule: str) -> None:
    model = tiny("next_index")
    prefix = model.condition.prefix(3, CLASSES)
    sampling = Sampling(guidance=3.0, guidance_schedule=schedule)
    network, scales = sampling.network(model), sampling.guidance_scales(12)
    expected = torch.stack(
        [formula(model, TOKENS, prefix, float(scale))[:, k] for k, scale in enumerate(scales)], 1
    )
    torch.testing.assert_close(network(TOKENS, prefix), expected, atol=1e-4, rtol=1e-4)
    logits, cache = network.begin(prefix, TOKENS[:, :4])
    steps = [logits] + [network.step(TOKENS[:, k : k + 1], cache) for k in range(4, 11)]
    torch.testing.assert_close(torch.stack(steps, 1), expected[:, 4:], atol=1e-4, rtol=1e-4)


def test_at_scale_1_guided_logits_are_those_with_the_condition_bit_for_bit() -> None:
    logits = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    assert torch.equal(guided(logits, torch.ones(1)), logits[:3])
    assert torch.equal(guided(logits, torch.zeros(3)), logits[3:])


@torch.no_grad()
def test_in_the_masked_scheme_the_scale_is_that_of_what_is_written_of_each_image() -> None:
    model = tiny("masked")
    prefix = model.condition.prefix(3, CLASSES)
    sampling = Sampling(guidance=3.0, guidance_schedule="linear")
    tokens = TOKENS.clone()
    for image, written in enumerate((0, 5, 12)):
        tokens[image, written:] = 24
    found = sampling.network(model)(tokens, prefix)
    for image, scale in enumerate((1, 1 + 2 * 5 / 12, 1 + 2 * 11 / 12)):
        expected = formula(model, tokens, prefix, scale)[image]
        torch.testing.assert_close(found[image], expected, atol=1e-4, rtol=1e-4)


@SCHEMES
@torch.no_grad()
def test_scale_1_is_without_guidance_bit_for_bit_and_scale_0_ignores_the_condition(
    scheme: str,
) -> None:
    model = tiny(scheme)
    plain, other = (
        model.condition.prefix(3, {"cls": torch.tensor(ids)}) for ids in ([0, 3, 4], [1, 2, 0])
    )

    def sampled(prefix: Prefix, **knobs: float) -> Tensor:
        return generate_codes(model, prefix, Sampling(**knobs), 7, range(3))

    assert torch.equal(sampled(plain, guidance=1.0), sampled(plain))
    assert not torch.equal(sampled(plain, guidance=3.0), sampled(plain))
    assert torch.equal(sampled(plain, guidance=0.0), sampled(other, guidance=0.0))


@SCHEMES
def test_a_guided_image_does_not_depend_on_its_batch(scheme: str) -> None:
    generator = Generator(tiny(scheme, vqgan_fingerprint=""), vqgan())
    classes = [0, 3, 4, 1, 2]
    alone, together = (
        generator.sample(condition=classes, seed=1, guidance=2.0, batch=batch).codes
        for batch in (1, 5)
    )
    assert torch.equal(alone, together)


@SCHEMES
def test_without_dropped_conditions_in_training_guidance_is_refused(scheme: str) -> None:
    generator = Generator(tiny(scheme, null_prefix=False), vqgan())
    with pytest.raises(UserError, match=r"guidance: 1\.5 needs .*\(loss\.condition_dropout\)"):
        generator.sample(condition=[0], guidance=1.5)
    assert generator.sample(condition=[0], guidance=1.0).codes.shape == (1, 3, 4)


@SCHEMES
@torch.no_grad()
def test_while_images_are_generated_and_measured_the_host_waits_for_nothing(scheme: str) -> None:
    model = tiny(scheme)
    prefix, choose = model.condition.prefix(3, CLASSES), Sampling(0.9, 5, 0.9).choose
    drawn = uniforms(0, range(3), model.scheme.uniforms(12), torch.device("cpu"))
    network = Sampling(guidance=2.0, guidance_schedule="cosine").network(model)
    with Waiting() as waiting:
        model.scheme.generate(network, prefix, 12, 24, choose, drawn)
        model.scheme.evaluation_pair(TOKENS, 24)
    assert waiting.found == []
