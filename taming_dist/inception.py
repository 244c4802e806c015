"""The Inception network whose features FID and its kin compare: that of 2015-12-05 (arXiv
1706.08500), as `torch-fidelity` has it, bilinear resizing to 299 pixels as TensorFlow 1 did it
included.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from taming_dist.caches import cache_folder
from taming_dist.errors import UserError
from taming_dist.vision import torchvision_models
from taming_dist.weights import load_weights

LAYER = "2048"  # as its features are called, by their number
# of sFID: the first channels of a map of 17 x 17, after its normalisation and ReLU. ADM's evaluator
# (arXiv 2105.05233) takes them by TensorFlow's name, which is `Mixed_6d.branch1x1` here.
SPATIAL_LAYER, CHANNELS, MAP_SIDE = "mixed_6/conv:7", 7, 17
RANDOM_LAYER, RANDOM_SIDE, RANDOM_MAP_SIDE = (
    "64",
    75,
    3,
)  # random features are for tests, which need not wait for more


@dataclass(frozen=True)
class Weights:
    """The pinned weights."""

    digest: str
    fetch_command: str = "python tools/fetch_inception.py"

    @property
    def cache_file(self) -> Path:
        return cache_folder() / "inception-2015-12-05.safetensors"


INCEPTION = Weights("737ff4a91a89b749e4041cb811e513bbca64a05bc59574bc08fe8d8baae74e45")

# of the Inception Score: what the network says of 1,008 classes, without the bias
LOGITS, CLASSES, RANDOM_CLASSES = "logits_unbiased", 1008, 10


def classifier_file() -> Path:
    """Where the last layer of the network is kept, by `tools/fetch_inception.py --classifier`."""
    return cache_folder() / "inception-2015-12-05-classifier.safetensors"


def blank_inception(*layers: str) -> Any:
    """The network up to the last of `layers` (or `LAYER`) without its weights, nor the classifier,
    which is not needed here.

    Raises:
        UserError: torch-fidelity is missing.
    """
    torchvision_models("FID")  # which torch-fidelity imports, where its operators may not load
    try:
        from torch_fidelity import feature_extractor_inceptionv3 as module
    except ImportError as error:
        raise UserError("FID needs torch-fidelity: pip install 'taming_dist[eval]'") from error
    # it fetches weights by itself, or unpickles a file
    with (
        torch.random.fork_rng(devices=[]),
        mock.patch.object(module, "load_state_dict_from_url", return_value={}),
        mock.patch.object(module.FeatureExtractorInceptionV3, "load_state_dict"),
    ):
        torch.manual_seed(0)
        network = module.FeatureExtractorInceptionV3(
            "inception", list(layers or (LAYER,)), verbose=False
        )
    network.fc = nn.Identity()
    return network


class Inception(nn.Module):
    """Images uint8 [b,3,h,w] -> features [b,d] of a layer. `digest` says which weights it has,
    `spatial_dim` how many numbers s the spatial features have. `classifier` [classes,d], on the
    CPU, makes logits of features; None where it is not there."""

    def __init__(
        self,
        network: Any,
        layer: str,
        digest: str,
        map_side: int,
        classifier: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.network, self.layer, self.digest = network, layer, digest
        self.classifier = classifier
        self.dim, self.spatial_dim = int(layer), CHANNELS * map_side**2

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        features, *_ = self.network(images)
        return features

    @torch.no_grad()
    def with_spatial(self, images: Tensor) -> Tensor:
        """The features and, behind them, the spatial ones: [b,d+s], of one pass; `parted` is the
        way back."""
        seen: list[Tensor] = []
        hook = self.network.Mixed_6d.branch1x1.register_forward_hook(
            lambda _module, _given, found: seen.append(found[:, :CHANNELS].flatten(1))
        )
        try:
            features = self(images)
        finally:
            hook.remove()
        return torch.cat([features, *seen], 1)

    def parted(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Features [b,d] and spatial ones [b,s] of those of `with_spatial`."""
        own, spatial = features.split([self.dim, self.spatial_dim], 1)
        return own, spatial


def inception(weights: str) -> Inception:
    """The network with its pretrained weights, or random ones (tests).

    Raises:
        UserError: the weights are not there, or not right.
    """
    if weights == "random":
        return random_inception()
    network = blank_inception()
    tensors = load_weights(INCEPTION)
    if tensors is None:
        raise UserError(
            f"no Inception weights: {INCEPTION.cache_file} is missing, run "
            f"{INCEPTION.fetch_command} (needs a package index)"
        )
    ones = {n: t for n, t in network.state_dict().items() if n not in tensors}
    network.load_state_dict(ones | tensors)
    return Inception(network, LAYER, INCEPTION.digest, MAP_SIDE, kept_classifier())


def kept_classifier() -> Tensor | None:
    """The last layer of the network, None where it was not fetched.

    Raises:
        UserError: it is damaged.
    """
    file = classifier_file()
    if not file.exists():
        return None
    try:
        found = load_file(file).get("fc.weight")
    except (SafetensorError, OSError):
        found = None
    if found is None or found.shape != (CLASSES, int(LAYER)):
        raise UserError(f"{file} is damaged: delete it, or fetch it anew (docs/evaluation.md)")
    return found


def random_inception() -> Inception:
    """A small part of the network, on small images, with weights that are the same everywhere."""
    network = blank_inception(RANDOM_LAYER, "768")  # the second lies behind the spatial features
    network.INPUT_IMAGE_SIZE = RANDOM_SIDE
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        for module in network.modules():
            if isinstance(module, nn.Conv2d):  # features as large as those of trained ones
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        classifier = torch.randn(RANDOM_CLASSES, int(RANDOM_LAYER))
    return Inception(network, RANDOM_LAYER, "random", RANDOM_MAP_SIDE, classifier)
