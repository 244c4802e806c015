"""A classifier whose probability of an image's class says how good the image is.

It is a ResNet of torchvision, as in arXiv 2012.09841, section 4.4 (there ResNet-101 on ImageNet),
with torchvision's weights, whose classes are ImageNet's in their usual order, or with others.
"""

from collections.abc import Mapping
from pathlib import Path
from urllib.error import URLError

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from taming_dist.access import require_readable
from taming_dist.errors import UserError
from taming_dist.placeholders import refuse_placeholder
from taming_dist.pretrained import torchvision_models
from taming_dist.ranges import check_choice

# name -> the weights that torchvision has for it
RESNETS = {
    "resnet18": "ResNet18_Weights",
    "resnet34": "ResNet34_Weights",
    "resnet50": "ResNet50_Weights",
    "resnet101": "ResNet101_Weights",
    "resnet152": "ResNet152_Weights",
}
SHORT_SIDE, SIDE = 256, 224  # pixels of what torchvision's were evaluated on: resized, then cropped
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels in [0, 1]


class ResNetClassifier:
    """The probability that a network, [b, 3, 224, 224] -> logits [b, classes], gives to classes."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network.eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, images: Tensor, classes: Tensor) -> Tensor:
        """Return scores [b] for images [b, 3, h, w] in [-1, 1] and their classes [b] int64."""
        logits = self.network(prepared(images.float()))
        return logits.softmax(-1).gather(1, classes[:, None])[:, 0]


def prepared(images: Tensor) -> Tensor:
    """Return what networks of torchvision read, [b, 3, 224, 224], of images in [-1, 1]."""
    short = min(images.shape[-2:])
    size = [round(side * SHORT_SIDE / short) for side in images.shape[-2:]]
    resized = F.interpolate(images, size, mode="bilinear", antialias=True, align_corners=False)
    top, left = ((side - SIDE) // 2 for side in size)
    cropped = resized[..., top : top + SIDE, left : left + SIDE]
    mean, std = (cropped.new_tensor(values)[:, None, None] for values in (MEAN, STD))
    return ((cropped + 1) / 2 - mean) / std


def open_classifier(
    name: str, weights: str, classes: int, device: torch.device
) -> ResNetClassifier:
    """The classifier `name` of RESNETS for a transformer that knows so many classes; `weights`: a
    file, or nothing for torchvision's.

    Raises:
        UserError: it cannot be had, or does not know these classes.
    """
    check_choice("classifier", name, RESNETS)
    tensors = _read(Path(weights)) if weights else _download(name)
    source = f"classifier_weights={weights}" if weights else f"classifier={name}"
    last = tensors.get("fc.weight")
    if last is None or last.ndim != 2:
        raise UserError(f"{source} has no fc.weight: give the tensors of a {name} of torchvision")
    if len(last) != classes:
        raise UserError(
            f"{source} knows {len(last)} classes, but the transformer knows {classes}: give "
            f"classifier_weights of a {name} that was trained on the transformer's classes"
        )
    network = getattr(torchvision_models("a classifier"), name)(num_classes=classes)
    try:
        network.load_state_dict(dict(tensors))
    except RuntimeError as error:
        raise UserError(f"{source} has not the tensors of a {name} of torchvision") from error
    return ResNetClassifier(network.to(device))


def _read(file: Path) -> Mapping[str, Tensor]:
    require_readable(file)
    if not file.is_file():
        raise UserError(f"classifier_weights: there is no file {file}")
    refuse_placeholder(file, "the weights of a classifier")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        found = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # what is no checkpoint raises a dozen types
        raise UserError(f"classifier_weights={file} holds no tensors") from error
    if not isinstance(found, Mapping) or not all(isinstance(t, Tensor) for t in found.values()):
        raise UserError(f"classifier_weights={file} holds no tensors by name")
    return found


def _download(name: str) -> Mapping[str, Tensor]:
    """Torchvision's weights, from torch.hub's cache or the internet."""
    url = getattr(torchvision_models("a classifier"), RESNETS[name]).IMAGENET1K_V1.url
    try:
        return torch.hub.load_state_dict_from_url(
            url, map_location="cpu", progress=False, check_hash=True, weights_only=True
        )
    except (URLError, OSError, RuntimeError) as error:  # the last: it is damaged
        raise UserError(
            f"classifier: the weights of {name} cannot be downloaded ({error}): give "
            f"classifier_weights the file of {url}, or leave classifier out to choose images by "
            f"their likelihood"
        ) from error
