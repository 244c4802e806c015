"""Features that wait on the device, and the files that they are compared with."""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from taming_dist import vision
from taming_dist.engine.world import World
from taming_dist.errors import UserError
from taming_dist.evaluation import features
from taming_dist.evaluation.distribution import frechet
from taming_dist.evaluation.features import Features
from taming_dist.evaluation.reference import open_reference
from taming_dist.evaluation.sources import Intake
from taming_dist.inception import inception

ALONE = World(0, 1, 0, torch.device("cpu"))


@pytest.mark.parametrize("room", [1, 10**9], ids=["fetched each time", "fetched at the end"])
def test_they_are_in_the_order_of_the_images_whenever_they_are_fetched(
    room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "ON_DEVICE", room)
    network = inception("random")
    images = torch.randint(0, 256, (5, 3, 24, 24), dtype=torch.uint8)
    taken = Features(network, network.dim)
    for numbers in ([1, 3], [0, 4], [2]):
        taken.add(images[numbers], torch.tensor(numbers))
    found = taken.gathered(ALONE)
    torch.testing.assert_close(found, network(images))


def test_spatial_features_are_those_of_the_layers_up_to_there_one_after_the_other() -> None:
    """And their distance is that of two Gaussians, by the eigenvalues of their product."""
    ours = inception("random")
    network, images = ours.network, torch.randint(0, 256, (8, 3, 75, 75), dtype=torch.uint8)
    x = (images.float() - 128) / 128  # of the size that the network resizes to
    for name in ("1a_3x3", "2a_3x3", "2b_3x3"):
        x = getattr(network, f"Conv2d_{name}")(x)
    x = network.Conv2d_4a_3x3(network.Conv2d_3b_1x1(network.MaxPool_1(x)))
    x = network.MaxPool_2(x)
    for name in ("5b", "5c", "5d", "6a", "6b", "6c"):
        x = getattr(network, f"Mixed_{name}")(x)
    branch = network.Mixed_6d.branch1x1
    expected = torch.relu(branch.bn(branch.conv(x)))[:, :7]
    assert expected.shape[1:] == (7, 3, 3)
    assert expected.std() > 0
    _, found = ours.parted(ours.with_spatial(images))
    torch.testing.assert_close(found, expected.flatten(1), rtol=1e-4, atol=1e-5)
    few, others = found[:, :3].double(), found[:, 20:23].double().flip(0) + 0.5
    means = (few.mean(0) - others.mean(0)).square().sum()
    covariances = [np.cov(each.numpy(), rowvar=False) for each in (few, others)]
    roots = np.sqrt(np.linalg.eigvals(covariances[0] @ covariances[1]).astype(complex)).real.sum()
    slow = float(means) + np.trace(covariances[0]) + np.trace(covariances[1]) - 2 * roots
    assert frechet(few.float(), others.float()) == pytest.approx(slow, rel=1e-4)


def test_there_are_none_of_no_images() -> None:
    assert Features.with_spatial(inception("random")).gathered(ALONE).shape == (0, 64 + 63)


def test_a_file_of_statistics_and_images_is_opened_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TAMING_DIST_CACHE", str(tmp_path / "cache"))
    file, network = tmp_path / "both.npz", inception("random")
    images = np.zeros((7, 24, 24, 3), np.uint8)
    np.savez(file, arr_0=images, mu=np.zeros(64), sigma=np.eye(64))
    asked: dict[str, Any] = {"network": network, "intake": Intake(4), "world": ALONE}
    first = open_reference(str(file), **asked)
    opened, kind = [], zipfile.ZipFile

    def counted(path: Any, *rest: Any, **named: Any) -> Any:
        opened.append(path)
        return kind(path, *rest, **named)

    monkeypatch.setattr(zipfile, "ZipFile", counted)
    again = open_reference(str(file), **asked)  # whose features are kept
    assert opened == [file]
    assert again.images == first.images == 7
    assert again.statistics is not None


def test_what_needs_torchvision_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(vision.importlib, "import_module", missing)
    with pytest.raises(UserError, match="torchvision is missing, for FID: No module named"):
        vision.torchvision_models("FID")
