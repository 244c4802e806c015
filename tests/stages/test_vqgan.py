"""Stage 1's step: the paper's losses and gradients, the original's numbers, and its order."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from taming_dist.generation.pictures import GAP
from taming_dist.losses.adversarial import Hinge
from taming_dist.models.autoencoder import AttnBlock, Decoder, Encoder, Middle, ResnetBlock
from taming_dist.models.discriminators import PatchGAN, PatchGANConfig, StyleGANConfig
from taming_dist.models.quantizers import EMAQuantizerConfig, VectorQuantizerConfig
from taming_dist.models.vqgan import VQGAN
from taming_dist.stages.vqgan import VQGANRecipe
from taming_dist.training.clock import Clock
from taming_dist.training.metrics import Means, read
from taming_dist.training.recipe import CODE_COUNTS

GOLDEN = Path(__file__).parents[1] / "golden" / "vqgan_step.pt"
Make = Callable[..., Any]


def step(recipe: VQGANRecipe, *batches: Any, at: int = 0) -> dict[str, float]:
    """The mean scalars of one optimizer step."""
    clock = Clock(global_batch=2 * len(batches), total_steps=100, images=at * 2 * len(batches))
    means = Means()
    means.add_all(recipe.train_step(batches, clock), torch.tensor(True))
    return read(means.take(recipe.world))


# The paper's formulas, the obvious way


def obvious_gradients(
    recipe: VQGANRecipe, images: Tensor, gan: bool
) -> tuple[dict[str, Tensor], Tensor]:
    """Gradients of the whole loss, by one backward through everything, and lambda from
    torch.autograd.grad at the last weight: what the recipe must equal."""
    network, discriminator = recipe.generator.module, recipe.engines["discriminator"].module
    out = network(images)
    loss = (images - out.images).abs().mean()
    weight = recipe.loss.terms["perceptual"].weight
    loss = loss + weight * recipe.lpips(images, out.images).mean()
    weight = torch.zeros(())
    total = loss + recipe.loss.codebook_weight * out.codebook_loss
    if gan:
        fooled = Hinge().generator(discriminator(out.images))
        last = network.decoder.conv_out.weight
        (rec,) = torch.autograd.grad(loss, last, retain_graph=True)
        (adversarial,) = torch.autograd.grad(fooled, last, retain_graph=True)
        weight = rec.norm() / (adversarial.norm() + 1e-4)
        total = total + recipe.loss.disc_weight * weight * fooled
    total.backward()
    named = network.named_parameters()
    return {name: p.grad.clone() for name, p in named if p.grad is not None}, weight


def relative(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """The norm of the difference of two sets of gradients over that of the second."""
    assert a.keys() == b.keys()
    difference = sum(float((a[name] - b[name]).square().sum()) for name in b)
    return (difference / sum(float(value.square().sum()) for value in b.values())) ** 0.5


@pytest.mark.parametrize("gan", [True, False])
@pytest.mark.parametrize(
    "quantizer",
    [
        VectorQuantizerConfig(codes=24, dim=8),
        EMAQuantizerConfig(codes=24, dim=8),
    ],
)
def test_the_step_equals_the_obvious_backward(
    recipe: Make, batch: Make, gan: bool, quantizer: Any
) -> None:
    settings = {
        "model": {"quantizer": quantizer},
        "disc_start": 0 if gan else 1,
        "perceptual": 0.7,
        "codebook_weight": 1.3,
    }
    trained, twin = recipe(**settings), recipe(**settings)
    scalars = step(trained, batch())
    expected, weight = obvious_gradients(twin, twin.autoencoder.input(batch()), gan)
    assert relative(trained.generator.gradients, expected) < 1e-5
    assert scalars.get("adaptive_weight", 0.0) == pytest.approx(weight.item(), rel=1e-5)


def test_the_discriminators_gradient_is_that_of_the_hinge_loss(recipe: Make, batch: Make) -> None:
    trained, twin = recipe(), recipe()
    scalars = step(trained, batch())
    images = twin.autoencoder.input(batch())
    network = twin.engines["discriminator"].module
    reconstructions = twin.generator.module(images).images.detach()
    loss = Hinge().discriminator(network(images), network(reconstructions))
    loss.backward()
    expected = {name: p.grad for name, p in network.named_parameters()}
    assert relative(trained.engines["discriminator"].gradients, expected) < 1e-5
    assert scalars["gan_d"] == pytest.approx(loss.item(), rel=1e-5)


def test_the_logged_loss_is_the_sum_of_its_terms(recipe: Make, batch: Make) -> None:
    weights = {"l1": 0.8, "perceptual": 0.5, "codebook_weight": 2.0, "disc_weight": 0.3}
    found = step(recipe(**weights), batch())
    expected = 0.8 * found["l1"] + 0.5 * found["perceptual"]
    assert found["rec"] == pytest.approx(expected, rel=1e-5)
    expected += 2.0 * found["codebook"] + 0.3 * found["adaptive_weight"] * found["gan_g"]
    assert found["loss"] == pytest.approx(expected, rel=1e-5)


def test_two_micro_batches_equal_one_of_both_while_there_is_no_gan(
    recipe: Make, batch: Make
) -> None:
    quantizer = {"quantizer": EMAQuantizerConfig(codes=24, dim=8)}
    split = recipe(quantizer, accumulation=2, disc_start=9)
    whole = recipe(quantizer, disc_start=9)
    both, parts = batch(4), [batch(4), batch(4)]
    parts[0].images, parts[1].images = both.images[:2], both.images[2:]
    in_parts, at_once = step(split, *parts), step(whole, both)
    assert in_parts == pytest.approx(at_once, rel=1e-5)
    assert relative(split.generator.gradients, whole.generator.gradients) < 1e-5
    for name in ("entries", "cluster_size", "cluster_sum"):
        torch.testing.assert_close(
            getattr(split.generator.module.quantize, name),
            getattr(whole.generator.module.quantize, name),
        )


# The original's numbers


def as_recorded(recipe: VQGANRecipe, golden: dict[str, Any]) -> None:
    """Give the recipe the recording's weights: seed 0, in the original's order of construction,
    where attention comes between the blocks of a level and D after the five heads of LPIPS."""
    vqgan: VQGAN = recipe.generator.module
    settings = {
        "latent_channels": 32,
        "channels": 32,
        "multipliers": [1, 2, 2],
        "blocks": 1,
        "attention_resolutions": [8],
        "resolution": 32,
    }
    torch.manual_seed(0)
    encoder = Encoder(3, **settings)
    after_encoder = torch.get_rng_state()
    decoder = Decoder(3, **settings)
    after_decoder = torch.get_rng_state()

    torch.set_rng_state(after_encoder)
    nn.Conv2d(32, 64, 3)
    Middle(64, 0.0)
    for index in range(2):
        decoder.up[2].block[index] = ResnetBlock(64, 64, 0.0)
        decoder.up[2].attn[index] = AttnBlock(64)

    torch.set_rng_state(after_decoder)
    for width in (64, 128, 256, 512, 512):
        nn.Conv2d(width, 1, 1, bias=False)
    discriminator = PatchGAN(PatchGANConfig(channels=16), 3)

    parts = {"encoder": encoder, "decoder": decoder}
    state = {
        f"{name}.{key}": value
        for name, part in parts.items()
        for key, value in part.state_dict().items()
    }
    vqgan.load_state_dict(state | golden["latent_side"])
    recipe.engines["discriminator"].module.load_state_dict(discriminator.state_dict())


@pytest.fixture
def golden() -> dict[str, Any]:
    return torch.load(GOLDEN, weights_only=True)


@pytest.fixture
def recorded(
    recipe: Make,
    golden: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> VQGANRecipe:
    """A recipe with the recording's weights, settings and images; its order as the parameter."""
    quantizer = VectorQuantizerConfig(codes=64, dim=32, legacy=True)
    made = recipe(
        {
            "quantizer": quantizer,
            "multipliers": [1, 2, 2],
            "attention_resolutions": [8],
            "latent_channels": 32,
        },
        disc_start=10,
        perceptual=0.0,
        discriminator=PatchGANConfig(channels=16),
        order=getattr(request, "param", "reused"),
    )
    as_recorded(made, golden)
    monkeypatch.setattr(made.autoencoder, "input", lambda batch: batch)
    return made


def test_codes_and_images_equal_the_original(recorded: VQGANRecipe, golden: dict[str, Any]) -> None:
    network = recorded.generator.module
    with torch.no_grad():
        latents = network.latents(golden["images"])
        codes = network.encode(golden["images"])
        decoded = network.decode_codes(codes)
    close = {"atol": 1e-4, "rtol": 1e-4}
    torch.testing.assert_close(latents[:, :, ::3, ::3], golden["prequant"], **close)
    assert torch.equal(codes, golden["indices"].long())
    torch.testing.assert_close(decoded[:, :, ::4, ::4], golden["decoded"], **close)


@pytest.mark.parametrize("at", [0, 10])
def test_losses_and_gradients_equal_the_original_before_and_after_the_gan_starts(
    recorded: VQGANRecipe, golden: dict[str, Any], at: int
) -> None:
    expected = golden[f"step{at}"]
    found = step(recorded, golden["images"], at=at)
    theirs = expected["generator"]
    assert found["rec"] == pytest.approx(theirs["rec_loss"], rel=1e-5)
    assert found["codebook"] == pytest.approx(theirs["quant_loss"], rel=1e-4)
    assert found["loss"] == pytest.approx(theirs["total_loss"], rel=1e-4)
    norms = norms_of(recorded.generator.gradients)
    assert norms == pytest.approx(expected["generator_norms"], rel=2e-3, abs=1e-6)
    at_last = recorded.generator.gradients["decoder.conv_out.weight"]
    torch.testing.assert_close(at_last, expected["conv_out"], atol=1e-6, rtol=1e-3)
    if at < 10:
        assert "gan_g" not in found
        return
    assert found["gan_g"] == pytest.approx(theirs["g_loss"], rel=1e-4)
    assert found["adaptive_weight"] * 0.8 == pytest.approx(theirs["d_weight"], rel=1e-4)
    judged = expected["discriminator"]
    assert found["gan_d"] == pytest.approx(judged["disc_loss"], rel=1e-4)
    assert found["logits_real"] == pytest.approx(judged["logits_real"], rel=1e-4)
    assert found["logits_fake"] == pytest.approx(judged["logits_fake"], rel=1e-4)
    norms = norms_of(recorded.engines["discriminator"].gradients)
    assert norms == pytest.approx(expected["discriminator_norms"], rel=2e-3, abs=1e-6)


@pytest.mark.parametrize("recorded", ["updated"], indirect=True)
def test_two_steps_in_the_originals_order_equal_its_losses(
    recorded: VQGANRecipe, golden: dict[str, Any]
) -> None:
    """D is shown what the updated G makes; the recording used a learning rate of 1e-4."""
    found = [step(recorded, golden["images"], at=at) for at in (10, 11)]
    losses = [line[name] for line in found for name in ("loss", "gan_d")]
    recording = [0.5930509567260742, 1.0612998008728027, 0.5949219465255737, 1.0429033041000366]
    assert losses == pytest.approx(recording, rel=1e-3)


def norms_of(gradients: dict[str, Tensor]) -> dict[str, float]:
    return {name: value.norm().item() for name, value in gradients.items()}


# The order of the step


class Counting:
    """Counts the passes through networks, and backward passes that reach their weights."""

    def __init__(self, recipe: VQGANRecipe) -> None:
        self.passes: Counter[str] = Counter()
        generator, discriminator = recipe.generator.module, recipe.engines["discriminator"].module
        watched = {
            "encoder": generator.encoder,
            "decoder": generator.decoder.conv_in,
            "lpips": recipe.lpips.slices[0],
            "discriminator": discriminator,
        }
        for name, module in watched.items():
            module.register_forward_pre_hook(self._counter(name))
        weight = next(discriminator.parameters())
        weight.register_hook(self._counter("discriminator_gradient"))

    def _counter(self, name: str) -> Callable[..., None]:
        def count(*_: Any) -> None:
            self.passes[name] += 1

        return count


def test_before_the_gan_counts_nothing_of_it_is_computed(recipe: Make, batch: Make) -> None:
    made = recipe(disc_start=3)
    counting = Counting(made)
    found = step(made, batch(), at=2)
    assert counting.passes == {"encoder": 1, "decoder": 1, "lpips": 2}
    assert made.engines["discriminator"].steps == 0
    assert not {"gan_g", "gan_d", "adaptive_weight", "logits_real"} & found.keys()
    assert "gan_g" in step(made, batch(), at=3)


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        ({}, {"discriminator": 3}),
        ({"adaptive": "lagged", "gan": "non_saturating", "lecam_weight": 1.0}, {}),
        ({"augment": ["color", "translation", "cutout"], "l2": 1.0, "disc_ramp": 5}, {}),
        ({"order": "updated"}, {"encoder": 2, "decoder": 2}),
        ({"r1_weight": 1.0, "r1_every": 1}, {"discriminator": 4}),
        ({"r1_weight": 1.0, "r1_every": 3}, {}),  # not due
        ({"disc_start": 3, "disc_warmup": 2}, {"discriminator": 2}),
        # once more to set ActNorm from the first batch
        ({"discriminator": PatchGANConfig(8, 2, "actnorm")}, {"discriminator": 4}),
        ({"discriminator": StyleGANConfig(32, 4, 8)}, {}),
    ],
)
def test_nothing_is_computed_twice_in_any_variant(
    recipe: Make, batch: Make, variant: dict[str, Any], expected: dict[str, int]
) -> None:
    """G is walked once; D judges x^ for G, then x and x^ for itself."""
    made = recipe(**variant)
    discriminator = made.engines["discriminator"]
    counting = Counting(made)
    step(made, batch(), at=1)
    once = {"encoder": 1, "decoder": 1, "lpips": 2, "discriminator": 3}
    # the hook of a weight fires once for its whole backward pass: in D's own step and nowhere else
    assert counting.passes == once | expected | {"discriminator_gradient": 1}
    assert made.generator.calls == made.generator.backwards == made.generator.steps == 1
    assert discriminator.calls == 2
    assert discriminator.backwards == discriminator.steps == 1


def test_d_collects_no_gradient_and_no_statistics_in_gs_pass(recipe: Make, batch: Make) -> None:
    made = recipe()
    network = made.engines["discriminator"].module
    before = {name: value.clone() for name, value in network.named_buffers()}
    (draws,) = made.adversary.draws(Clock(2, 100))
    images = made.autoencoder.input(batch()).requires_grad_(True)
    loss = made.adversary.generator_loss(made.adversary.show(images.detach(), images, draws))
    torch.autograd.grad(loss, images)
    assert all(parameter.grad is None for parameter in network.parameters())
    assert all(torch.equal(value, before[name]) for name, value in network.named_buffers())
    step(made, batch())
    assert {int(value) for name, value in network.named_buffers() if "tracked" in name} == {2}


def test_the_perceptual_network_stays_frozen_and_in_eval_mode(recipe: Make, batch: Make) -> None:
    made = recipe()
    step(made, batch())
    assert not made.lpips.training
    assert all(p.grad is None and not p.requires_grad for p in made.lpips.parameters())


def test_validation_leaves_weights_codebook_and_training_mode_as_they_were(
    recipe: Make, batch: Make
) -> None:
    made = recipe({"quantizer": EMAQuantizerConfig(codes=24, dim=8)})
    before = made.generator.full_state()
    figures = made.validate(iter([(batch(), True), (batch(seed=1), True), (batch(), False)]))
    made.preview(batch())
    after = made.generator.full_state()
    assert made.generator.module.training
    assert all(torch.equal(before[name], after[name]) for name in before)
    twice = made.validate(iter([(batch(), True), (batch(seed=1), True)]))
    assert figures == twice  # a batch that only keeps ranks in step does not count


def test_validation_tells_how_often_each_code_was_used(recipe: Make, batch: Make) -> None:
    made = recipe({"quantizer": EMAQuantizerConfig(codes=24, dim=8)})
    figures = made.validate(iter([(batch(), True), (batch(seed=1), False)]))
    counts = figures[CODE_COUNTS]
    codes = made.generator.module.encode(made.autoencoder.input(batch()))
    assert counts == codes.flatten().bincount(minlength=24).tolist()
    assert figures["codebook_usage"] == sum(count > 0 for count in counts) / 24


def test_window_metrics_cover_every_micro_batch_since_they_were_taken(
    recipe: Make, batch: Make
) -> None:
    made = recipe(disc_start=9, lr=0.0, accumulation=2)
    codes = [made.generator.module.encode(made.autoencoder.input(batch(seed=n))) for n in range(4)]
    for first in (0, 2):
        step(made, batch(seed=first), batch(seed=first + 1))
    metrics = read(made.window_metrics())
    assert metrics["codebook_usage"] == pytest.approx(len(torch.cat(codes).unique()) / 24)
    assert "codebook_usage" not in made.window_metrics()


def test_the_preview_shows_images_above_their_reconstructions(recipe: Make, batch: Make) -> None:
    made = recipe()
    picture = made.preview(batch(3)).picture
    assert picture.shape == (3, 2 * 32 + GAP, 3 * 32 + 2 * GAP)
    assert picture.dtype == torch.uint8
    assert torch.equal(picture[:, :32, 32 + GAP : 64 + GAP], batch(3).images[1])
