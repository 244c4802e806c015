"""A generator of two tiny exports: same images in any batch, right pairs only."""

from typing import Any

import pytest
import torch

from taming_dist.errors import UserError
from taming_dist.generation.generator import Generator, generate_codes
from taming_dist.generation.sampling import Sampling
from taming_dist.models.prior.conditions import ClassCondition, CodesCondition
from taming_dist.models.prior.schemes import NextScale
from taming_dist.models.prior.transformer import Transformer, TransformerConfig
from taming_dist.models.quantizers import MultiScaleConfig, VectorQuantizerConfig
from taming_dist.models.vqgan import VQGAN
from tests.tiny_models import tiny_config


def tiny_vqgan(codes: int = 24, seed: int = 0) -> VQGAN:
    torch.manual_seed(seed)
    quantizer = VectorQuantizerConfig(codes=codes, dim=4)
    return VQGAN(tiny_config(quantizer)).eval()


def tiny_transformer(vqgan: VQGAN, **settings: Any) -> Transformer:
    torch.manual_seed(1)
    config = TransformerConfig(
        **{
            "vocabulary": vqgan.config.vocabulary,
            "grid": [3, 4],
            "layers": 2,
            "heads": 2,
            "width": 16,
            "vqgan_fingerprint": vqgan.fingerprint,
        }
        | settings
    )
    model = Transformer(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.6)
    return model


@pytest.fixture(scope="module")
def pair() -> Generator:
    vqgan = tiny_vqgan()
    return Generator(tiny_transformer(vqgan, condition=ClassCondition(5)), vqgan)


def test_samples_are_images_of_codes(pair: Generator) -> None:
    images, codes = pair.sample(condition=[0, 4, 2], seed=3)
    assert images.shape == (3, 3, 6, 8)
    assert images.abs().max() <= 1
    assert codes.shape == (3, 3, 4)
    assert codes.dtype == torch.int64
    with torch.no_grad():
        assert torch.equal(images, pair.vqgan.decode_codes(codes).clamp(-1, 1))


@pytest.mark.parametrize(
    "knobs", [{}, {"top_k": 5}, {"top_p": 0.7}, {"top_k": 9, "top_p": 0.9, "temperature": 0.8}]
)
def test_an_image_does_not_depend_on_the_batch_it_is_made_in(
    pair: Generator, knobs: dict[str, Any]
) -> None:
    classes = torch.arange(8) % 5
    alone, in_threes, together = (
        pair.sample(condition=classes, seed=1, batch=batch, **knobs).codes for batch in (1, 3, 8)
    )
    assert torch.equal(alone, in_threes)
    assert torch.equal(alone, together)
    assert torch.equal(pair.sample(condition=classes[:2], seed=1, **knobs).codes, alone[:2])


def test_seed_class_and_index_each_change_an_image(pair: Generator) -> None:
    codes = pair.sample(condition=[1, 1, 2], seed=0).codes
    other_seed = pair.sample(condition=[1, 1, 1], seed=5).codes
    other_class = pair.sample(condition=[3, 1, 2], seed=0).codes
    assert not torch.equal(codes[0], codes[1])
    assert not torch.equal(codes[0], other_seed[0])
    assert not torch.equal(codes[0], other_class[0])


def test_tokens_follow_the_models_distribution() -> None:
    vqgan = tiny_vqgan(codes=6)
    transformer = tiny_transformer(vqgan, grid=[1, 2]).eval()
    prefix = transformer.condition.prefix(4000, {})
    with torch.no_grad():
        tokens = generate_codes(transformer, prefix, Sampling(), 0, range(4000)).flatten(1)
        first = torch.arange(6).repeat_interleave(6)
        second = torch.arange(6).repeat(6)
        logits = transformer(torch.stack([first, second], 1), prefix.rows(slice(36))).log_softmax(
            -1
        )
    expected = (logits[range(36), 0, first] + logits[range(36), 1, second]).exp()
    shares = (tokens[:, 0] * 6 + tokens[:, 1]).bincount(minlength=36) / 4000
    assert torch.allclose(shares, expected, atol=0.03)


def test_greedy_samples_ignore_the_seed(pair: Generator) -> None:
    one, two = (pair.sample(condition=[2], temperature=0, seed=seed).codes for seed in (0, 1))
    assert torch.equal(one, two)


def test_unconditional_samples_need_a_count_only() -> None:
    vqgan = tiny_vqgan()
    generator = Generator(tiny_transformer(vqgan), vqgan)
    assert generator.sample(2).codes.shape == (2, 3, 4)
    with pytest.raises(UserError, match="class_id: this transformer is unconditional"):
        generator.sample(2, condition=[0, 1])


def test_a_model_in_training_stays_in_training(pair: Generator) -> None:
    vqgan = tiny_vqgan()
    transformer = tiny_transformer(vqgan, dropout_residual=0.5).train()
    generator = Generator(transformer, vqgan)
    assert torch.equal(generator.sample(2).codes, generator.sample(2).codes)
    assert transformer.training
    assert transformer.blocks[0].dropout.training
    assert not vqgan.training


def test_another_vqgan_is_refused_naming_both_fingerprints() -> None:
    vqgan, other = tiny_vqgan(), tiny_vqgan(seed=9)
    with pytest.raises(UserError, match=f"{other.tokenizer_fingerprint}.*{vqgan.fingerprint}"):
        Generator(tiny_transformer(vqgan), other)
    Generator(tiny_transformer(vqgan, vqgan_fingerprint=""), other)


def test_another_vocabulary_is_refused_naming_both() -> None:
    vqgan = tiny_vqgan()
    with pytest.raises(UserError, match="24 codes.* 30"):
        Generator(tiny_transformer(vqgan, vocabulary=30), vqgan)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ({"condition": [5]}, "class_id: 5 .* 0 to 4"),
        ({"n": 2}, "class_id: this transformer is class-conditional"),
        ({"n": 3, "condition": [0, 1]}, "class_id: 3 images need 3 classes, not 2"),
        ({}, "n: None"),
        ({"n": 0}, "n: 0"),
        ({"condition": []}, "n: 0"),
        (
            {"condition": [0], "size": (12, 17)},
            "size: .* 12x17 are not multiples .* 2 .* give 12x1",
        ),
        ({"condition": [0], "size": (4, 16)}, "size: 4x16 is smaller than the 6x8 that"),
        ({"condition": [0], "size": (12, 16), "window_step": 3}, "window_step: .* 1 to 2"),
        ({"condition": [0], "window_step": 2}, "window_step: 2 is for a size above the 6x8"),
        ({"condition": [9], "size": (12, 16)}, "class_id: 9 .* 0 to 4"),
        ({"condition": [0], "size": (12, 16), "guidance": 2.0}, "guidance: 2.0"),
        ({"condition": [0], "guidance": 2.0}, "guidance: 2.0"),
        ({"condition": [0], "batch": 0}, "batch: 0"),
        ({"condition": [0], "temperature": -1}, "temperature=-1"),
        ({"condition": [0], "steps": 4}, "steps: .* model/scheme=next_index has no such setting"),
    ],
)
def test_requests_that_cannot_be_served_are_refused(
    pair: Generator, request_: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        pair.sample(**request_)


def test_a_larger_image_does_not_depend_on_its_batch(pair: Generator) -> None:
    classes = [0, 4, 2]
    images, codes = pair.sample(condition=classes, size=(10, 14), seed=3, batch=1, top_k=9)
    assert images.shape == (3, 3, 10, 14)
    assert codes.shape == (3, 5, 7)
    together = pair.sample(condition=classes, size=(10, 14), seed=3, batch=9, top_k=9).codes
    assert torch.equal(codes, together)
    alone = pair.sample(condition=classes[:1], size=(10, 14), seed=3, top_k=9, window_memory=0)
    assert torch.equal(codes[:1], alone.codes)
    assert not torch.equal(codes, pair.sample(condition=[0, 4, 3], size=(10, 14), seed=3).codes)
    with torch.no_grad():
        assert torch.equal(images[:1], pair.vqgan.decode_codes(codes[:1]).clamp(-1, 1))


def test_a_larger_image_is_given_a_condition_of_its_own_size() -> None:
    vqgan = tiny_vqgan()
    condition = CodesCondition(7, [3, 4])
    generator = Generator(tiny_transformer(vqgan, condition=condition), vqgan)
    given = torch.randint(7, (2, 5, 9))
    assert generator.sample(condition=given, size=(10, 18)).codes.shape == (2, 5, 9)
    with pytest.raises(UserError, match=r"codes of the grid \[5, 9\], not \[2, 3, 4\]"):
        generator.sample(condition=given[:, :3, :4], size=(10, 18))
    with pytest.raises(UserError, match=r"condition: a code is outside of 0 to 6"):
        generator.sample(condition=given + 1, size=(10, 18))


def test_the_trained_size_may_be_named(pair: Generator) -> None:
    assert pair.sample(condition=[0], size=(6, 8)).images.shape == (1, 3, 6, 8)


def test_a_masked_image_may_be_made_in_other_steps_than_the_models_own() -> None:
    vqgan = tiny_vqgan()
    generator = Generator(tiny_transformer(vqgan, scheme="masked"), vqgan)
    own, eight, one = (generator.sample(3, steps=steps).codes for steps in (None, 8, 1))
    assert torch.equal(own, eight)
    assert not torch.equal(own, one)
    surest = generator.sample(3, choice_temperature=0.0).codes
    assert not torch.equal(own, surest)
    assert generator.transformer.scheme.steps == 8
    with pytest.raises(UserError, match="steps=0"):
        generator.sample(3, steps=0)


def test_in_bf16_a_copy_is_sampled_from_and_the_answers_are_those_of_training_in_bf16() -> None:
    vqgan = tiny_vqgan()
    transformer = tiny_transformer(vqgan, condition=ClassCondition(5), block="rar")
    generator = Generator(transformer, vqgan, precision="bf16")
    half = generator.sampled
    assert {half.head.weight.dtype, half.blocks[0].attn.qkv.weight.dtype} == {torch.bfloat16}
    assert {weight.dtype for weight in transformer.parameters()} == {torch.float32}
    prefix, tokens = generator.prefix(condition=[0, 3]), torch.arange(24).view(2, 12)
    network = Sampling().network(half)
    transformer.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected = transformer(tokens, prefix)
    with torch.no_grad():
        logits, cache = network.begin(prefix, tokens[:, :5])
        assert cache.keys[0].dtype == torch.bfloat16
        assert torch.equal(network(tokens, prefix), expected)
        scale = expected.float().std()
        assert (logits - expected[:, 5]).abs().mean() < 0.05 * scale
        assert (network.step(tokens[:, 5:6], cache) - expected[:, 6]).abs().mean() < 0.05 * scale
    assert generator.sample(condition=[0, 3], seed=1).codes.shape == (2, 3, 4)
    with pytest.raises(UserError, match="precision=fp8: use fp32 or bf16"):
        Generator(transformer, vqgan, precision="fp8")


def test_settings_are_kept_until_others_are_asked_for(pair: Generator) -> None:
    one = pair.sampler(Sampling(top_k=3))
    assert pair.sampler(Sampling(top_k=3)) is one
    assert pair.sampler(Sampling(top_k=4)) is not one


@pytest.mark.parametrize("scheme", ["next_index", "masked"])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
@torch.no_grad()
def test_an_image_is_the_same_alone_in_any_batch_in_any_order_and_on_any_rank(
    scheme: str, guidance: float
) -> None:
    transformer = tiny_transformer(
        tiny_vqgan(), condition=ClassCondition(5), scheme=scheme, null_prefix=True
    ).eval()
    sampling = Sampling(0.9, 12, guidance=guidance, guidance_schedule="linear")

    def written(images: list[int]) -> dict[int, torch.Tensor]:
        classes = {"cls": torch.tensor(images) % 5}
        prefix = transformer.condition.prefix(len(images), classes)
        codes = generate_codes(transformer, prefix, sampling, 11, images)
        return dict(zip(images, codes, strict=True))

    together = written(list(range(8)))
    parts = [[5], [7, 6, 5, 4, 3, 2, 1, 0], [0, 1, 2], [3, 4, 5], [6, 7]]
    parts += [list(range(rank, 8, 3)) for rank in range(3)]  # the images of three ranks
    for images in parts:
        for image, codes in written(images).items():
            assert torch.equal(codes, together[image])


def test_a_transformer_has_the_scales_of_the_tokenizer_not_others_of_as_many_codes() -> None:
    vqgan = VQGAN(tiny_config(MultiScaleConfig(codes=6, dim=4, scales=[1, 3, 4, 8]), 16)).eval()
    right, wrong = (
        tiny_transformer(vqgan, grid=[90], scheme=NextScale(scales), vqgan_fingerprint="")
        for scales in ([1, 3, 4, 8], [1, 5, 8])
    )
    Generator(right, vqgan)
    with pytest.raises(UserError, match=r"scales=\[1, 5, 8\]: the VQGAN has .*\[1, 3, 4, 8\]"):
        Generator(wrong, vqgan)
