"""What a first stage encodes: photographs, or maps of labels, depth or edges.

A modality knows how many channels it has, how the bytes of a sample become the network's input, and
how that input or the network's output is shown. Source: arXiv 2012.09841, section 4.1 (the
conditions are encoded by VQGANs of their own); the original encodes label maps as one channel per
class.

Legend: b batch, c channels, h w pixels, v classes.
"""

import colorsys
import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Num, UInt8
from omegaconf import MISSING
from torch import Tensor

from taming_dist.copies import to_device
from taming_dist.errors import UserError
from taming_dist.ranges import check_ranges, ranged


@dataclasses.dataclass
class Modality(ABC):
    """One kind of picture.

    `column`: what it reads of a batch, of `taming_dist.data.images.COLUMNS`.
    """

    column: ClassVar[str]

    @property
    @abstractmethod
    def name(self) -> str:
        """Its own, that `model/modality=` has."""

    @property
    @abstractmethod
    def channels(self) -> int:
        """Of the network's input and output."""

    @abstractmethod
    def tensor(self, column: Num[Tensor, "b *size"]) -> Float[Tensor, "b c h w"]:
        """The network's input, contiguous, from a batch's column in any layout."""

    @abstractmethod
    def picture(self, output: Float[Tensor, "b c h w"]) -> Float[Tensor, "b 3 h w"]:
        """An input or output as colours, about in [-1,1]."""

    def take(self, columns: Mapping[str, Tensor], device: torch.device) -> Num[Tensor, "b *size"]:
        """The column that it reads, on the device; `UserError` for numbers that mean nothing."""
        return to_device(columns[self.column], device)


@dataclasses.dataclass
class Grey(Modality):
    """One channel, shown in shades of grey."""

    @property
    def channels(self) -> int:
        return 1

    def picture(self, output: Float[Tensor, "b 1 h w"]) -> Float[Tensor, "b 3 h w"]:
        return output.float().expand(-1, 3, -1, -1)


@dataclasses.dataclass
class RGB(Modality):
    """Photographs: bytes <-> [-1,1]."""

    name: str = "rgb"
    column: ClassVar[str] = "image"

    @property
    def channels(self) -> int:
        return 3

    def tensor(self, column: UInt8[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        return column.contiguous().float() / 127.5 - 1.0

    def picture(self, output: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
        return output.float()


@dataclasses.dataclass
class LowResolution(RGB):
    """Photographs of few pixels, enlarged to the size of the others: for super-resolution."""

    name: str = "low_resolution"
    column: ClassVar[str] = "lr"


@dataclasses.dataclass
class Edges(Grey):
    """Edges: bytes, 255 on an edge <-> [-1,1]."""

    name: str = "edges"
    column: ClassVar[str] = "edges.png"

    def tensor(self, column: UInt8[Tensor, "b h w"]) -> Float[Tensor, "b 1 h w"]:
        return column[:, None].float() / 127.5 - 1.0


@dataclasses.dataclass
class Depth(Grey):
    """Depth maps: shares of the largest depth that the files can hold <-> [-1,1]. Who writes them
    chooses the scale; the original spreads each map over the whole range."""

    name: str = "depth"
    column: ClassVar[str] = "depth.png"

    def tensor(self, column: Float[Tensor, "b h w"]) -> Float[Tensor, "b 1 h w"]:
        return column[:, None].float() * 2.0 - 1.0


@dataclasses.dataclass
class LabelMap(Modality):
    """Label maps: class ids -> one channel per class; the output is a logit each."""

    classes: int = ranged(MISSING, at_least=2, at_most=256)  # label maps have 8 bits
    name: str = "labels"
    column: ClassVar[str] = "seg.png"

    def __post_init__(self) -> None:
        check_ranges(self, "model.modality")

    @property
    def channels(self) -> int:
        return self.classes

    def take(self, columns: Mapping[str, Tensor], device: torch.device) -> Num[Tensor, "b *size"]:
        highest = int(columns[self.column].max())  # where the bytes still are
        if highest >= self.classes:
            raise UserError(
                f"model.modality.classes={self.classes}, but a label map has the class "
                f"{highest}: set it to {highest + 1} or more (the class for what is unlabelled "
                f"counts too)"
            )
        return super().take(columns, device)

    def tensor(self, column: UInt8[Tensor, "b h w"]) -> Float[Tensor, "b v h w"]:
        return F.one_hot(column.long(), self.classes).movedim(-1, 1).float()

    def picture(self, output: Float[Tensor, "b v h w"]) -> Float[Tensor, "b 3 h w"]:
        """The likeliest class of each pixel in its colour."""
        colours = palette(self.classes).to(output.device)
        return colours[output.argmax(1)].movedim(-1, 1)


def palette(classes: int) -> Float[Tensor, "v 3"]:
    """A colour for each class in [-1,1]: neighbouring ids get hues far apart (the golden
    ratio of a turn), and every other round another brightness."""
    golden = 0.618034
    colours = [
        colorsys.hsv_to_rgb(index * golden % 1, 0.75 - 0.25 * (index % 2), 1 - 0.2 * (index % 3))
        for index in range(classes)
    ]
    return torch.tensor(colours) * 2 - 1


def nearest(
    inputs: Float[Tensor, "b c h w"], shape: tuple[int, int]
) -> Float[Tensor, "b c {shape[0]} {shape[1]}"]:
    """Inputs in a shape, by nearest neighbour: a condition that is encoded in fewer pixels than its
    image has. Source: the original's downsample_cond_size."""
    return inputs if inputs.shape[-2:] == shape else F.interpolate(inputs, shape)


MODALITIES: dict[str, type[Modality]] = {
    "rgb": RGB,
    "labels": LabelMap,
    "depth": Depth,
    "edges": Edges,
    "low_resolution": LowResolution,
}
