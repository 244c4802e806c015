"""The variants of stage 1's GAN: when it counts, what steadies it, and what it remembers."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from taming_dist.engine.world import World
from taming_dist.errors import UserError
from taming_dist.losses.adversarial import Hinge
from taming_dist.losses.terms import L1Config, L2Config, PerceptualConfig
from taming_dist.models.discriminators import DinoConfig, PatchGANConfig, StyleGANConfig
from taming_dist.stages.adaptive import AdaptiveWeight, Global, Lagged
from taming_dist.stages.vqgan import VQGANRecipe
from taming_dist.stages.vqgan_loss import VQGANLossConfig
from taming_dist.training.clock import Clock
from taming_dist.training.metrics import Means, read

Make = Callable[..., Any]
PLAIN = PatchGANConfig(channels=8, layers=2, norm="none")  # no statistics over a micro-batch


def step(recipe: VQGANRecipe, *batches: Any, at: int = 0) -> dict[str, float]:
    """The mean scalars of one optimizer step."""
    images = sum(len(batch.images) for batch in batches)
    means = Means()
    clock = Clock(images, 100, images=at * images)
    means.add_all(recipe.train_step(batches, clock), torch.tensor(True))
    return read(means.take(recipe.world))


def halves(batch: Any) -> list[Any]:
    return [type(batch)(part) for part in batch.images.chunk(2)]


def weights_of(recipe: VQGANRecipe) -> Tensor:
    """All weights of D."""
    parameters = recipe.engines["discriminator"].module.parameters()
    return torch.cat([p.detach().flatten() for p in parameters])


# When the GAN counts


def test_the_gan_counts_from_its_start_on_and_grows_over_its_ramp() -> None:
    loss = VQGANLossConfig(disc_start=10, disc_ramp=3, disc_weight=0.8)
    found = [loss.gan_weight(step) for step in (9, 10, 11, 12, 13, 50)]
    assert found == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 0.8])
    assert VQGANLossConfig(disc_start=10).gan_weight(10) == 0.8


def test_d_learns_before_its_loss_counts(recipe: Make, batch: Make) -> None:
    warm, cold = recipe(disc_start=3, disc_warmup=2), recipe(disc_start=3)
    before = weights_of(warm)
    assert "gan_d" not in step(warm, batch(), at=0)
    assert torch.equal(weights_of(warm), before)
    found = step(warm, batch(), at=1)
    assert "gan_d" in found
    assert not {"gan_g", "adaptive_weight"} & found.keys()
    assert not torch.equal(weights_of(warm), before)
    for at in (0, 1):
        step(cold, batch(), at=at)
    pairs = zip(
        warm.generator.full_state().values(), cold.generator.full_state().values(), strict=True
    )
    assert all(torch.equal(a, b) for a, b in pairs)  # G does not notice
    assert "gan_g" in step(warm, batch(), at=3)


def test_without_gan_there_is_one_engine_and_no_term_of_it(recipe: Make, batch: Make) -> None:
    made = recipe(discriminator=None)
    found = step(made, batch())
    assert set(made.engines) == {"generator"}
    assert found.keys() == {"l1", "perceptual", "rec", "codebook", "loss"}
    made.load_state_dict(made.state_dict())


# The adaptive weight


def test_the_lagged_weight_is_that_of_the_step_before(recipe: Make, batch: Make) -> None:
    """With a learning rate of 0 and the same batch, `global` tells what it was."""
    here, lagged = (
        recipe(adaptive=name, lr=0.0, discriminator=PLAIN) for name in ("global", "lagged")
    )
    expected = step(here, batch())["adaptive_weight"]
    first, second = step(lagged, batch()), step(lagged, batch(seed=1), at=1)
    assert first["adaptive_weight"] == 0
    assert second["adaptive_weight"] == pytest.approx(expected)
    assert step(here, batch(seed=1))["adaptive_weight"] != pytest.approx(expected, rel=1e-3)


def test_a_fixed_weight_is_one_and_asks_nothing_of_the_gradients(
    recipe: Make, batch: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    clamped, fixed = recipe(adaptive_min=1.0, adaptive_max=1.0), recipe(adaptive="fixed")
    expected = step(clamped, batch())

    def refuse(*args: Any) -> Tensor:
        raise AssertionError("a gradient at the last layer")

    monkeypatch.setattr("taming_dist.stages.adaptive.last_layer_gradients", refuse)
    assert step(fixed, batch()) == expected
    assert expected["adaptive_weight"] == 1
    found = fixed.generator.gradients
    assert all(torch.equal(found[name], clamped.generator.gradients[name]) for name in found)


@pytest.mark.parametrize("kind", [Global, Lagged])
@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_gradients_that_are_not_finite_leave_a_finite_weight(
    kind: type[AdaptiveWeight], bad: float
) -> None:
    """Their step is skipped; the log, and the lagged weight, must outlive it."""
    made = kind(World(0, 1, 0, torch.device("cpu")), 0.0, 1e4)
    features, rec = torch.randn(1, 4, 5, 5), torch.randn(1, 3, 5, 5)
    made.update([made(features, rec, rec)], moved=torch.tensor(True))
    parts = [made(features, rec, gan) for gan in (torch.full_like(rec, bad), 2 * rec)]
    assert all(part.weight.isfinite() for part in parts)
    made.update(parts, moved=torch.tensor(False))
    after = made(features, rec, 2 * rec).weight
    assert float(after) == pytest.approx(1.0 if kind is Lagged else 0.5, rel=1e-3)


def test_lagged_lecam_and_augmentation_do_not_notice_how_the_batch_is_cut(
    recipe: Make, batch: Make
) -> None:
    settings = {
        "adaptive": "lagged",
        "lecam_weight": 0.5,
        "lecam_decay": 0.5,
        "r1_weight": 0.2,
        "r1_every": 2,
        "augment": ["color", "translation", "cutout"],
        "discriminator": PLAIN,
    }
    whole, cut = recipe(**settings, micro_batch=4), recipe(**settings, accumulation=2)
    for at in range(4):
        images = batch(4, seed=at)
        once, twice = step(whole, images, at=at), step(cut, *halves(images), at=at)
        assert twice == pytest.approx(once, rel=2e-4)
    assert once["adaptive_weight"] > 0
    assert once["lecam"] > 0
    for name, value in whole.state_dict().items():
        assert cut.state_dict()[name] == pytest.approx(value, rel=1e-4)


@pytest.mark.parametrize(
    ("adaptive", "discriminator", "named"),
    [
        ("global", PLAIN, ["adaptive weight"]),
        ("lagged", PatchGANConfig(norm="batch", channels=8, layers=1), ["batch statistics"]),
        ("fixed", StyleGANConfig(size=16, channels=8), ["batch statistics"]),
        ("per_rank", StyleGANConfig(size=16, channels=8), ["adaptive weight", "batch statistics"]),
        ("lagged", PatchGANConfig(norm="actnorm", channels=8, layers=1), []),
        ("global", None, []),
    ],
)
def test_what_is_taken_of_each_micro_batch_is_named(
    recipe: Make, adaptive: str, discriminator: Any, named: list[str]
) -> None:
    said = recipe(adaptive=adaptive, discriminator=discriminator).depends_on_the_cut()
    assert (said is None) == (named == [])
    for what in ("adaptive weight", "batch statistics"):
        assert (what in (said or "")) == (what in named)


def test_the_adaptive_weight_stays_within_its_clamps(recipe: Make, batch: Make) -> None:
    assert step(recipe(adaptive_min=50.0), batch())["adaptive_weight"] == 50
    assert step(recipe(adaptive_max=1e-6), batch())["adaptive_weight"] == pytest.approx(1e-6)


# What steadies D


def test_r1_is_the_penalty_of_its_steps_and_weighs_as_much_as_in_every_step(
    recipe: Make, batch: Make
) -> None:
    made, twin = (recipe(r1_weight=0.3, r1_every=4, discriminator=PLAIN, lr=0.0) for _ in range(2))
    assert "r1" not in step(made, batch(), at=3)
    found = step(made, batch(), at=4)
    images = twin.autoencoder.input(batch())
    fake = twin.generator.module(images).images.detach()
    network = twin.engines["discriminator"].module
    leaf = images.clone().requires_grad_(True)
    real = network(leaf)
    (gradient,) = torch.autograd.grad(real.mean((1, 2, 3)).sum(), leaf, create_graph=True)
    penalty = 0.5 * gradient.square().sum((1, 2, 3)).mean()
    (Hinge().discriminator(network(images), network(fake)) + 0.3 * 4 * penalty).backward()
    assert found["r1"] == pytest.approx(penalty.item(), rel=1e-4)
    for name, parameter in network.named_parameters():
        if parameter.grad is not None:
            mine = made.engines["discriminator"].gradients[name]
            torch.testing.assert_close(mine, parameter.grad, atol=1e-6, rtol=1e-3)


def test_lecam_follows_the_logits_and_pulls_from_the_second_step_on(
    recipe: Make, batch: Make
) -> None:
    made = recipe(lecam_weight=1.0, lecam_decay=0.9, discriminator=PLAIN)
    first = step(made, batch())
    assert "lecam" not in first
    averages = [first["logits_real"], first["logits_fake"]]
    assert made.state_dict()["lecam"] == pytest.approx(averages)
    second = step(made, batch(), at=1)
    assert "lecam" in second
    expected = [
        0.9 * old + 0.1 * new
        for old, new in zip(averages, (second["logits_real"], second["logits_fake"]), strict=True)
    ]
    assert made.state_dict()["lecam"] == pytest.approx(expected, rel=1e-4)


def test_what_the_recipe_remembers_goes_through_a_checkpoint(recipe: Make, batch: Make) -> None:
    settings = {"lecam_weight": 1.0, "adaptive": "lagged", "lr": 0.0, "discriminator": PLAIN}
    went_on, resumed = recipe(**settings), recipe(**settings)
    step(went_on, batch())
    resumed.load_state_dict(json.loads(json.dumps(went_on.state_dict())))
    assert step(resumed, batch(seed=1), at=1) == step(went_on, batch(seed=1), at=1)


def test_d_sees_image_and_reconstruction_under_the_same_augmentation(
    recipe: Make, batch: Make
) -> None:
    made = recipe(augment=["color", "translation", "cutout"])
    adversary, images = made.adversary, made.autoencoder.input(batch())
    seen = []
    for at in (0, 0, 1):
        (draws,) = adversary.draws(Clock(2, 100, images=2 * at))
        shown = adversary.show(images, images, draws)
        assert torch.equal(shown.real, shown.fake)
        seen.append(shown.real)
    assert torch.equal(seen[0], seen[1])  # a function of the seed and the images seen so far
    assert not torch.equal(seen[0], seen[2])
    assert not torch.equal(seen[0], images)


def test_actnorm_is_set_by_the_first_images_that_d_is_shown(recipe: Make, batch: Make) -> None:
    made = recipe(discriminator=PatchGANConfig(channels=8, layers=2, norm="actnorm"), lr=0.0)
    network = made.engines["discriminator"].module
    outputs: list[Tensor] = []
    step(made, batch())
    layer = network.main[3]
    layer.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    with torch.no_grad():
        network(made.autoencoder.input(batch()))
    torch.testing.assert_close(outputs[0].mean((0, 2, 3)), torch.zeros(16), atol=1e-5, rtol=0)
    std = outputs[0].transpose(0, 1).flatten(1).std(1)
    torch.testing.assert_close(std, torch.ones(16), atol=1e-3, rtol=0)
    before = layer.loc.clone()
    step(made, batch(seed=1), at=1)
    assert torch.equal(layer.loc, before)  # set once


@pytest.mark.parametrize(("order", "passes"), [("reused", 2), ("updated", 3)])
def test_frozen_features_of_a_reconstruction_serve_both_g_and_d(
    recipe: Make, batch: Make, order: str, passes: int
) -> None:
    made = recipe(discriminator=DinoConfig(weights="random", depths=[0, 1]), order=order)
    features = made.adversary.features
    before = weights_of(made)
    count: list[int] = []
    features.register_forward_pre_hook(lambda module, inputs: count.append(1))
    found = step(made, batch())
    assert len(count) == passes
    assert found["adaptive_weight"] > 0
    assert not torch.equal(weights_of(made), before)
    assert all(p.grad is None for p in features.parameters())
    assert not any("blocks" in name for name in made.engines["discriminator"].full_state())


# Refusals


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"adaptive": "local"}, r"loss\.adaptive=local: use global or per_rank or lagged or fixed"),
        ({"gan": "wasserstein"}, r"loss\.gan=wasserstein: use hinge or vanilla or non_saturating"),
        ({"order": "both"}, r"loss\.order=both: use reused or updated"),
        ({"augment": ["flip"]}, r"loss\.augment=flip: use color or translation or cutout"),
        ({"adaptive_min": 2.0, "adaptive_max": 1.0}, r"loss\.adaptive_min=2\.0"),
        ({"adaptive": "fixed", "adaptive_max": 0.5}, r"loss\.adaptive=fixed has no clamps"),
        ({"disc_warmup": -1}, r"loss\.disc_warmup=-1"),
        ({"r1_weight": 1.0, "discriminator": DinoConfig()}, r"loss\.r1_weight=1\.0: R1 is for"),
        ({"r1_every": 0}, r"loss\.r1_every=0"),
        ({"lecam_decay": 1.0}, r"loss\.lecam_decay=1\.0"),
        ({"terms": {"l1": L1Config(-1)}}, r"loss\.terms\.l1\.weight=-1"),
        ({"terms": {"l1": L1Config(0)}}, r"loss\.terms: no term .* loss\.terms\.l1\.weight=1"),
        ({"terms": {}}, r"loss\.terms: no term"),
        ({"terms": {"rec": L2Config()}}, r"loss\.terms\.rec is .* name it l2 or l2_\.\.\."),
        (
            {"terms": {"perceptual": PerceptualConfig(net="vit")}},
            r"net=vit: use vgg or alex",
        ),
    ],
)
def test_settings_that_mean_nothing_are_the_users_mistake(
    settings: dict[str, Any], line: str
) -> None:
    with pytest.raises(UserError, match=line):
        VQGANLossConfig(**settings)


def test_stylegan_takes_powers_of_two_and_one_size() -> None:
    with pytest.raises(UserError, match=r"loss\.discriminator\.size=96: .* power of two from 8 on"):
        StyleGANConfig(size=96)
    with pytest.raises(UserError, match=r"data\.size=128: set loss\.discriminator\.size=128 too"):
        StyleGANConfig(size=64).check_size(128)
