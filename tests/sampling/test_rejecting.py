"""Rejection sampling from Python and by the command: which candidates there are, what is told of
them, and what is refused."""

import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from taming_dist.errors import UserError
from taming_dist.generation.generator import Generator
from taming_dist.generation.rejection import Rejection, log_likelihood
from taming_dist.generation.sampling import Sampling
from taming_dist.models.prior.conditions import ClassCondition
from taming_dist.models.prior.orders import SpiralOut
from taming_dist.models.prior.schemes import Masked
from taming_dist.models.vqgan import VQGAN
from taming_dist.pretrained import torchvision_models
from taming_dist.sample import load_generator, main
from taming_dist.sampling.classifier import open_classifier, prepared
from tests.sampling.conftest import Asked
from tests.tiny_models import save_transformer


def brightness(images: Tensor, classes: Tensor) -> Tensor:
    """A classifier that finds the classes 0 and 2 in dark images and 1 in bright ones."""
    return images.mean(dim=(1, 2, 3)) * (2 * (classes % 2) - 1)


@pytest.fixture
def classes(exports: Path, tmp_path: Path) -> Path:
    """A transformer of 3 classes in another order than row by row."""
    vqgan = VQGAN.from_pretrained(exports / "vqgan")
    return save_transformer(
        tmp_path / "class", vqgan, condition=ClassCondition(3), order=SpiralOut()
    )


def test_an_image_is_the_likeliest_of_its_own_candidates(asked: Asked) -> None:
    generator = load_generator(asked())
    all_of_them = generator.sample(12, seed=3).codes
    with torch.no_grad():
        prefix = generator.prefix(12)
        scores = log_likelihood(generator.transformer, all_of_them, prefix).view(3, 4)
    expected = all_of_them.view(3, 4, 4, 4)[range(3), scores.argmax(1)]
    for batch in (1, 2, 3):
        stream = generator.stream(
            generator.prefix(3), Sampling(), 3, batch, rejection=Rejection(0.25)
        )
        parts = list(stream)
        assert torch.equal(torch.cat([part.codes for part in parts]), expected)
        told = torch.cat([part.scores for part in parts if part.scores is not None])
        assert torch.allclose(told, scores.amax(1), rtol=1e-5)
    assert torch.equal(generator.sample(3, seed=3, acceptance=0.25).codes, expected)


@pytest.mark.parametrize("masked", [False, True])
def test_a_classifier_chooses_by_the_class_that_was_asked_for(
    asked: Asked, exports: Path, tmp_path: Path, masked: bool
) -> None:
    vqgan = VQGAN.from_pretrained(exports / "vqgan")
    scheme = {"scheme": Masked(steps=2)} if masked else {}
    folder = save_transformer(tmp_path / "gpt", vqgan, condition=ClassCondition(3), **scheme)
    generator: Generator = load_generator(asked(transformer=folder))
    wanted = [0, 1, 2, 1]
    knobs = {"condition": wanted, "acceptance": 0.2, "classifier": brightness, "seed": 1}
    chosen = generator.sample(**knobs)
    every = generator.sample(condition=[each for each in wanted for _ in range(5)], seed=1)
    mean = every.images.mean(dim=(1, 2, 3)).view(4, 5)
    rows = zip(wanted, mean, strict=True)
    best = torch.stack([row.max() if k % 2 else row.min() for k, row in rows])
    assert torch.allclose(chosen.images.mean(dim=(1, 2, 3)), best, atol=1e-6)
    assert torch.equal(generator.sample(**knobs, batch=1).codes, chosen.codes)


def test_the_command_tells_rate_and_scores(asked: Asked, tmp_path: Path) -> None:
    main(asked(acceptance=0.3, n=3))
    written = json.loads((tmp_path / "o" / "samples.json").read_text())
    assert written["settings"]["acceptance"] == 0.3
    assert [each["candidates"] for each in written["images"]] == [3, 3, 3]
    assert all(-math.inf < each["score"] < 0 for each in written["images"])


def test_what_nothing_can_be_chosen_by_is_refused(
    asked: Asked, exports: Path, classes: Path, tmp_path: Path
) -> None:
    vqgan = VQGAN.from_pretrained(exports / "vqgan")
    masked = save_transformer(tmp_path / "masked", vqgan, scheme=Masked(steps=2))
    (tmp_path / "text.pth").write_text("a holiday")
    half = {"acceptance": 0.5}
    for settings, message in (
        ({"transformer": masked} | half, "acceptance: .*masked has no likelihood"),
        ({"classifier": "resnet18"} | half, "classifier: .*not class-conditional"),
        ({"classifier": "resnet18"}, "classifier: it chooses among candidates"),
        ({"classifier_weights": "x"} | half, "classifier_weights: of which network"),
        ({"acceptance": 0.0}, "acceptance=0.0"),
        (
            {"transformer": classes, "classifier": "vgg"} | half,
            "classifier=vgg: use resnet18 or resnet34",
        ),
        (
            {"transformer": classes, "classifier": "resnet18", "classifier_weights": "none"} | half,
            "classifier_weights: there is no file none",
        ),
        (
            {
                "transformer": classes,
                "classifier": "resnet18",
                "classifier_weights": str(tmp_path / "text.pth"),
            }
            | half,
            "classifier_weights=.*text.pth holds no tensors",
        ),
    ):
        with pytest.raises(UserError, match=message) as refused:
            main(asked(**settings))
        assert len(str(refused.value).splitlines()) == 1
        assert not (tmp_path / "o").exists()


@pytest.mark.slow
def test_a_resnet_of_torchvision_scores_images(asked: Asked, classes: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = torchvision_models("classifiers").resnet18(num_classes=3).eval()
    weights = tmp_path / "resnet.safetensors"
    save_file(network.state_dict(), weights)
    given = {"classifier": "resnet18", "classifier_weights": str(weights), "acceptance": 0.5}
    main(asked(transformer=classes, n=3, **given))
    written = json.loads((tmp_path / "o" / "samples.json").read_text())
    assert all(0 < each["score"] < 1 for each in written["images"])
    images = torch.rand(2, 3, 40, 64) * 2 - 1
    score = open_classifier("resnet18", str(weights), 3, torch.device("cpu"))
    with torch.no_grad():
        expected = network(prepared(images)).softmax(1)[[0, 1], [2, 0]]
    assert torch.allclose(score(images, torch.tensor([2, 0])), expected)
    with pytest.raises(UserError, match="knows 3 classes, but the transformer knows 1000"):
        open_classifier("resnet18", str(weights), 1000, torch.device("cpu"))
    with pytest.raises(UserError, match="has not the tensors of a resnet50"):
        open_classifier("resnet50", str(weights), 3, torch.device("cpu"))


def test_a_classifier_reads_what_torchvision_prepares() -> None:
    grey = prepared(torch.zeros(1, 3, 300, 400))
    assert grey.shape == (1, 3, 224, 224)
    mean, std = (
        torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    )
    assert torch.allclose(grey[0] * std + mean, torch.tensor(0.5), atol=1e-6)
