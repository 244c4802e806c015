"""Small trained heads on the features of a frozen DINO ViT-S/16.

Sources: the features arXiv 2104.14294 (DINO) and 2010.11929 (ViT); the discriminator arXiv
2301.09515 (StyleGAN-T), section 4.2; spectral normalisation arXiv 1802.05957.

Legend: b batch, k depths, n patches, e width of the features.
"""

import dataclasses
import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32
from torch import Tensor, nn

from taming_dist.errors import UserError
from taming_dist.exact import without_autocast
from taming_dist.models.discriminators.config import DiscriminatorConfig
from taming_dist.models.discriminators.norms import NORMS
from taming_dist.ranges import check_ranges, ranged
from taming_dist.resizing import resized

PATCH, WIDTH, DEPTH, HEADS, SIDE = 16, 384, 12, 6, 224  # ViT-S/16 as published
KERNEL = 9
COLOURS = 3
# Mean and deviation of ImageNet for pixels in [0, 1]
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclasses.dataclass
class DinoConfig(DiscriminatorConfig):
    """`weights` of the frozen ViT: a .safetensors or .pth file with the names of the public
    checkpoint, hub to download that, or random (tests only). `depths`: after which of its 12 blocks
    there is a head; `norm` in the heads: batch, group or none. Images of any size are resized."""

    reads_images = False

    weights: str = dataclasses.field(default="hub", metadata={"may_change": True})  # a place
    depths: list[int] = ranged([2, 5, 8, 11], at_least=0, at_most=DEPTH - 1)
    norm: str = "batch"

    def __post_init__(self) -> None:
        check_ranges(self, "loss.discriminator")
        if len(set(self.depths)) < len(self.depths):
            raise UserError(f"loss.discriminator.depths={self.depths}: name each depth once")
        if self.norm not in ("batch", "group", "none"):
            raise UserError(f"loss.discriminator.norm={self.norm}: use batch, group or none")

    def check_channels(self, channels: int) -> None:
        if channels != COLOURS:
            raise UserError(
                f"loss.discriminator=dino reads colours, and the images of model.modality have "
                f"{channels} channels instead of {COLOURS}: use loss/discriminator=patchgan"
            )


class DinoFeatures(nn.Module):
    """The frozen ViT: images of 1 or 3 channels in [-1, 1] -> features after k of its blocks.

    Images are resized to `side` pixels. As StyleGAN-T reads them, the class token is added to every
    patch. Parameter names are those of the public checkpoint; its last norm is not needed.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, depths: list[int], side: int = SIDE) -> None:
        super().__init__()
        self.depths, self.side = sorted(depths), side
        self.cls_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.pos_embed = nn.Parameter(torch.randn(1, (side // PATCH) ** 2 + 1, WIDTH) * 0.02)
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, WIDTH, PATCH, PATCH)})
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        shape = (1, 3, 1, 1)
        for name, values in (("mean", MEAN), ("deviation", DEVIATION)):
            self.register_buffer(name, torch.tensor(values).reshape(shape), persistent=False)
        self.requires_grad_(False)
        self.eval()

    def forward(self, images: Float[Tensor, "b c h w"]) -> Float[Tensor, "b k n e"]:
        x = (self._resized(images.float()) + 1) / 2
        x = self.patch_embed["proj"]((x - self.mean) / self.deviation).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1) + self.pos_embed
        found = []
        for index, block in enumerate(self.blocks[: self.depths[-1] + 1]):
            x = block(x)
            if index in self.depths:
                found.append(x[:, 1:] + x[:, :1])
        return torch.stack(found, 1)

    def _resized(self, images: Tensor) -> Tensor:
        area = min(images.shape[2:]) > self.side
        return resized(images, (self.side, self.side), "area" if area else "bicubic")


class Block(nn.Module):
    """Attention and perceptron, each behind a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(WIDTH, eps=1e-6)
        self.attn = Attention()
        self.norm2 = nn.LayerNorm(WIDTH, eps=1e-6)
        hidden = 4 * WIDTH
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(WIDTH, hidden), "fc2": nn.Linear(hidden, WIDTH)})

    def forward(self, x: Float[Tensor, "b n e"]) -> Float[Tensor, "b n e"]:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Float[Tensor, "b n e"]) -> Float[Tensor, "b n e"]:
        q, k, v = self.qkv(x).unflatten(2, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class SpectralConv(nn.Module):
    """Convolution along the patches, circular, its weight divided by its largest singular value.

    That value follows the weight by one step of power iteration in each pass in which `track` is
    true: in the discriminator's own pass, not when the generator looks through it.
    """

    track: bool = True
    u: Tensor

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__()
        plain = nn.Conv2d(inputs, outputs, (kernel, 1))
        self.weight, self.bias = plain.weight, plain.bias
        self.register_buffer("u", F.normalize(torch.randn(outputs), dim=0))

    def forward(self, x: Float[Tensor, "b e n 1"]) -> Float[Tensor, "b out n 1"]:
        margin = self.weight.shape[2] // 2
        x = F.pad(x, (0, 0, margin, margin), mode="circular")
        return F.conv2d(x, self.weight / self._largest(), self.bias)

    def _largest(self) -> Float32[Tensor, ""]:
        """The largest singular value of the weight as a matrix [outputs, -1]."""
        with without_autocast(self.weight.device):
            matrix = self.weight.float().flatten(1)
            with torch.no_grad():
                v = F.normalize(matrix.T @ self.u, dim=0)
                u = F.normalize(matrix @ v, dim=0)
                if self.training and self.track:
                    self.u.copy_(u)
            return u @ matrix @ v


class Head(nn.Module):
    """Features -> logits: one layer per patch, one over neighbours."""

    def __init__(self, norm: str) -> None:
        super().__init__()
        self.first = layer(1, norm)
        self.second = layer(KERNEL, norm)
        self.out = SpectralConv(WIDTH, 1, 1)

    def forward(self, x: Float[Tensor, "b e n 1"]) -> Float[Tensor, "b 1 n 1"]:
        x = self.first(x)
        return self.out((x + self.second(x)) / math.sqrt(2))


def layer(kernel: int, norm: str) -> nn.Sequential:
    """Convolution, norm, leaky ReLU."""
    return nn.Sequential(SpectralConv(WIDTH, WIDTH, kernel), NORMS[norm](WIDTH), nn.LeakyReLU(0.2))


class DinoHeads(nn.Module):
    """The trained part: features of `DinoFeatures` -> logits."""

    def __init__(self, config: DinoConfig, image_channels: int) -> None:
        super().__init__()
        self.heads = nn.ModuleList(Head(config.norm) for _ in config.depths)

    def forward(self, features: Float[Tensor, "b k n e"]) -> Float[Tensor, "b 1 n k"]:
        pairs = zip(self.heads, features.transpose(2, 3).unsqueeze(4).unbind(1), strict=True)
        return torch.cat([head(x) for head, x in pairs], 3)
