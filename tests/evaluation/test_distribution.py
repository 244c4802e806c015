"""Distances between sets of images: those of torch-fidelity's own command, and of a slow form."""

import math
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from taming_dist.evaluation.distribution import (
    OfClasses,
    density_and_coverage,
    distances,
    frechet,
    frechet_by_class,
    frechet_of_few,
    inception_score,
)
from taming_dist.evaluation.protocol import Protocol
from taming_dist.inception import INCEPTION, LAYER, RANDOM_LAYER, blank_inception, inception
from taming_dist.weights import load_weights


def features(count: int, shift: float, dim: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, dim, generator=generator) + shift


def test_a_set_is_no_distance_away_from_itself() -> None:
    same = features(60, 0.0)
    found = distances(same, same)
    assert found["fid"] == pytest.approx(0, abs=1e-3)
    assert found["precision"] == found["recall"] == found["coverage"] == 1
    near, far = distances(features(50, 0.1), same), distances(features(50, 3.0), same)
    assert near["fid"] < far["fid"]
    assert near["kid"] < far["kid"]
    assert near["density"] > far["density"] == 0


@pytest.mark.parametrize(("count", "others"), [(50, 60), (9, 60), (60, 9), (9, 7)])
def test_the_distance_without_covariances_is_that_of_torch_fidelity(
    count: int, others: int
) -> None:
    made, real = 2 * features(count, 0.3), features(others, 0.0)
    assert frechet_of_few(made, real) == pytest.approx(frechet(made, real), rel=1e-4)
    assert frechet_of_few(made, made) == pytest.approx(0, abs=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "documented"), [(42, 12.6388), (123, 12.7202)])
@torch.no_grad()
def test_the_figures_that_torchmetrics_documents_come_out(seed: int, documented: float) -> None:
    """Those of its example of FID with 64 features: 1.9 names no seed, those before 123. Images are
    drawn after the network was built, whose blank weights take random numbers, too."""
    weights = load_weights(INCEPTION)
    if weights is None:
        pytest.skip("there are no Inception weights here: python tools/fetch_inception.py")
    network = blank_inception(RANDOM_LAYER)
    network.load_state_dict(weights, strict=False)
    from torch_fidelity import feature_extractor_inceptionv3 as module

    torch.manual_seed(seed)
    with (
        mock.patch.object(module, "load_state_dict_from_url", return_value={}),
        mock.patch.object(module.FeatureExtractorInceptionV3, "load_state_dict"),
    ):
        module.FeatureExtractorInceptionV3("inception", [RANDOM_LAYER], verbose=False)
    sets = [torch.randint(*span, (100, 3, 299, 299)).byte() for span in ((0, 200), (100, 255))]
    real, made = (torch.cat([network(part)[0] for part in images.split(25)]) for images in sets)
    assert frechet(made, real) == pytest.approx(documented, abs=5e-5)


def test_the_distance_of_a_class_is_that_of_its_images() -> None:
    made, real = features(30, 0.3), features(41, 0.0)
    labels = torch.arange(30) % 3 * 2, torch.arange(41) % 6  # of the classes 0, 2, 4; 0 to 5
    found = frechet_by_class(OfClasses(made, labels[0]), OfClasses(real, labels[1]))
    assert found["images_by_class"] == [10, 0, 10, 0, 10]
    assert found["reference_images_by_class"] == [7, 7, 7, 7, 7]
    for number, value in enumerate(found["fid_by_class"]):
        of_class = made[labels[0] == number], real[labels[1] == number]
        assert (
            math.isnan(value)
            if number % 2
            else value == pytest.approx(frechet(*of_class), rel=1e-4)
        )
    few = frechet_by_class(OfClasses(made, labels[0]), OfClasses(real[:30], labels[1][:30]))
    assert all(map(math.isnan, few["fid_by_class"]))  # of 5 images


def test_density_and_coverage_are_those_of_a_loop_over_all_pairs() -> None:
    made, real, neighbours = features(40, 0.3, dim=4), features(30, 0.0, dim=4), 5
    held, covered = 0, 0
    for center in real:
        radius = sorted((center - other).norm() for other in real)[neighbours]
        inside = sum(bool((center - one).norm() < radius) for one in made)
        held += inside
        covered += inside > 0
    expected = held / len(made) / neighbours, covered / len(real)
    assert density_and_coverage(made, real) == pytest.approx(expected)


def save(folder: Path, images: np.ndarray) -> str:
    folder.mkdir()
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{number:03d}.png")
    return str(folder)


def test_figures_are_those_of_torch_fidelity_on_the_same_folders(tmp_path: Path) -> None:
    """With random weights, which it is given by a file, as it fetches none here."""
    network = inception("random")
    import torch_fidelity
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase

    class Theirs(FeatureExtractorBase):
        """Our network, with logits as theirs has them, which the small one stops before."""

        def __init__(self, name: str, features_list: list[str], **_: Any) -> None:
            super().__init__(name, features_list)

        def forward(self, images: Tensor) -> tuple[Tensor, ...]:
            found = network(images)
            known = {network.layer: found, "logits_unbiased": found @ network.classifier.T}
            return tuple(known[name] for name in self.features_list)

        @staticmethod
        def get_provided_features_list() -> tuple[str, ...]:
            return network.layer, "logits_unbiased"

        @staticmethod
        def get_default_feature_layer_for_metric(metric: str) -> str:
            return "logits_unbiased" if metric == "isc" else network.layer

        @staticmethod
        def can_be_compiled() -> bool:
            return False

        @staticmethod
        def get_dummy_input_for_compile() -> Tensor:
            return torch.zeros(1, 3, 8, 8, dtype=torch.uint8)

    torch_fidelity.register_feature_extractor("ours", Theirs)
    generator = np.random.default_rng(0)
    sets = [generator.integers(0, high, (12, 24, 24, 3), dtype=np.uint8) for high in (256, 200)]
    folders = [save(tmp_path / name, images) for name, images in zip("ab", sets, strict=True)]
    expected = torch_fidelity.calculate_metrics(
        input1=folders[0],
        input2=folders[1],
        feature_extractor="ours",
        feature_layer_fid=network.layer,
        feature_layer_kid=network.layer,
        feature_layer_prc=network.layer,
        feature_layer_isc="logits_unbiased",
        isc=True,
        fid=True,
        kid=True,
        prc=True,
        kid_subset_size=12,
        cuda=False,
        cache=False,
        verbose=False,
    )
    made, real = (network(torch.from_numpy(images).permute(0, 3, 1, 2)) for images in sets)
    found = distances(made, real)
    names = {
        "fid": "frechet_inception_distance",
        "kid": "kernel_inception_distance_mean",
        "precision": "precision",
        "recall": "recall",
    }
    assert found["fid"] > 1
    assert network.classifier is not None
    found |= inception_score(made, network.classifier)
    names |= {"inception_score": "inception_score_mean"}
    names |= {"inception_score_std": "inception_score_std"}
    for ours, theirs in names.items():
        assert found[ours] == pytest.approx(expected[theirs], rel=1e-4, abs=1e-9), ours


def test_the_inception_score_is_that_of_a_loop_over_splits() -> None:
    made = features(20, 0.0)
    classifier = torch.randn(7, 16, generator=torch.Generator().manual_seed(0))
    order = np.random.RandomState(2020).permutation(20)
    scores = []
    for split in np.array_split(order, 10):
        shares = torch.softmax(made[torch.from_numpy(split)].double() @ classifier.T.double(), 1)
        mean = shares.mean(0)
        scores.append(float((shares * (shares / mean).log()).sum(1).mean().exp()))
    found = inception_score(made, classifier)
    assert found["inception_score"] == pytest.approx(np.mean(scores), rel=1e-5)
    assert found["inception_score_std"] == pytest.approx(np.std(scores), rel=1e-4)
    assert inception_score(made[:9], classifier) == {}


def test_protocols_differ_in_their_hash_wherever_they_differ() -> None:
    one = Protocol(50, 60, "f" * 64, 64, "centre", "lanczos", "uint8", "d" * 64, LAYER)
    others = [
        Protocol(51, 60, "f" * 64, 64, "centre", "lanczos", "uint8", "d" * 64, LAYER),
        Protocol(50, 60, "e" * 64, 64, "centre", "lanczos", "uint8", "d" * 64, LAYER),
        Protocol(50, 60, "f" * 64, 64, "centre", "bicubic", "uint8", "d" * 64, LAYER),
    ]
    assert len({protocol.hash for protocol in [one, *others]}) == 4
    assert len(one.hash) == 8
    assert one.record()["hash"] == one.hash
