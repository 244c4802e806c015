"""Terms that look into the model through a trained projection, in the step of stage 1."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from taming_dist.errors import UserError
from taming_dist.losses.terms import L1Config, SemanticConfig, VFConfig
from taming_dist.models.vqgan import VQGAN
from taming_dist.stages.counting import vqgan_workload
from taming_dist.stages.vqgan import VQGANRecipe, check_term
from taming_dist.training.clock import Clock
from tests.tiny_timm import save_timm

Make = Callable[..., Any]


PROJECTIONS = {
    f"projections.{term}.{part}" for term in ("vf", "semantic") for part in ("weight", "bias")
}


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return save_timm(tmp_path_factory.mktemp("vit"), "test_vit")


@pytest.fixture
def followed(recipe: Make, vit: dict[str, str]) -> Make:
    """A small stage 1 whose latents follow a ViT."""

    def make(weight: float = 0.7, **settings: Any) -> VQGANRecipe:
        margins = {"cosine_margin": 0.0, "distance_margin": 0.0}
        terms = {
            "l1": L1Config(),
            "vf": VFConfig(weight, size=32, **margins, **vit),
            "semantic": SemanticConfig(weight, size=32, **vit),
        }
        return recipe(terms=terms, disc_start=9, **settings)

    return make


def test_the_step_equals_one_backward_through_everything(followed: Make, batch: Make) -> None:
    trained, twin = followed(), followed()
    (found,) = trained.train_step([batch()], Clock(2, 100))
    network, images = twin.generator.module, twin.autoencoder.input(batch())
    out = network(images)
    _, vf_of, semantic_of = twin.reconstruction.terms
    vf = vf_of(images, network.projections["vf"](network.latents(images)))
    z_q = network.post_quant_conv(network.quantize(network.latents(images)).z_q)
    semantic = semantic_of(images, network.projections["semantic"](network.decoder.coarse(z_q)))
    loss = (images - out.images).abs().mean() + 0.7 * vf + 0.7 * semantic + out.codebook_loss
    loss.backward()
    assert found["vf"].item() == pytest.approx(vf.item(), rel=1e-5)
    assert found["semantic"].item() == pytest.approx(semantic.item(), rel=1e-5)
    assert found["loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    gradients = trained.generator.gradients
    assert {name for name in gradients if "projections" in name} == PROJECTIONS
    for name, parameter in network.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-6)


def test_the_first_weights_of_the_model_do_not_depend_on_its_terms(
    followed: Make, recipe: Make
) -> None:
    with_, without = (made.generator.full_state() for made in (followed(), recipe()))
    assert with_.keys() - without.keys() == PROJECTIONS
    assert all(torch.equal(with_[name], without[name]) for name in without)


def test_a_projection_is_trained_and_in_no_export(
    followed: Make, batch: Make, tmp_path: Path
) -> None:
    made = followed(lr=1e-2)
    before = made.generator.full_state()["projections.vf.weight"]
    list(made.train_step([batch()], Clock(2, 100)))
    assert not torch.equal(made.generator.full_state()["projections.vf.weight"], before)
    export = made.export()
    assert not any("projections" in name for name in export.state)
    export.write(tmp_path / "export")
    images = made.autoencoder.input(batch())
    loaded = VQGAN.from_pretrained(tmp_path / "export")
    expected = made.generator.module.eval().encode(images)
    assert torch.equal(loaded.encode(images), expected)


def test_with_weight_0_the_network_does_not_run_and_the_projection_stays(
    followed: Make, batch: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = followed(0.0)
    before = made.generator.full_state()["projections.vf.weight"]
    made.reconstruction.terms[1].register_forward_pre_hook(refuse)
    (found,) = made.train_step([batch()], Clock(2, 100))
    assert "vf" not in found
    assert torch.equal(made.generator.full_state()["projections.vf.weight"], before)


def refuse(*_: Any) -> None:
    raise AssertionError("VF was computed")


def test_its_passes_are_counted(followed: Make, vit: dict[str, str]) -> None:
    made = followed()
    model, loss = made.generator.module.config, made.loss
    counts = [vqgan_workload(model, loss, 32).parts]
    loss.terms = {"l1": loss.terms["l1"]}
    counts.append(vqgan_workload(model, loss, 32).parts)
    dims, width, places = 8 + 32, 64, 8 * 8
    assert counts[0]["generator"] - counts[1]["generator"] == 3 * 2 * dims * width * places
    assert counts[0]["losses"] > counts[1]["losses"]


def test_a_frozen_part_cannot_follow(vit: dict[str, str]) -> None:
    with pytest.raises(UserError, match=r"loss\.terms\.semantic is for the decoder, which"):
        check_term("loss.terms.semantic", SemanticConfig(**vit), ["decoder"])
    with pytest.raises(UserError, match=r"loss\.terms\.vf is for the encoder, which .*weight=0"):
        check_term("loss.terms.vf", VFConfig(**vit), ["encoder", "quantizer"])
    check_term("loss.terms.vf", VFConfig(0.0, **vit), ["encoder", "quantizer"])
    with pytest.raises(UserError, match="there is no such file"):
        check_term("loss.terms.vf", VFConfig(**vit | {"path": "nowhere"}), [])
