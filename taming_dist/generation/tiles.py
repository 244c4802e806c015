"""Decode large pictures in tiles, in bounded memory: what the whole decode gives.

A tile is some rows of the picture, as wide as it is. Every GroupNorm takes its statistics over the
whole picture. So the decoder goes layer by layer: a step reads tiles of what the one before it left
in a scratch file, with the rows above and below that its convolution sees, and leaves its own;
statistics add up as tiles are written. Nothing is approximated, and nothing is computed twice but
those rows. Attention alone has its whole input at once, though not the weights between all of its
positions.

Legend: c channels, h w positions, n rows, i j latent grid, g groups.
"""

import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from taming_dist.copies import to_device
from taming_dist.errors import UserError
from taming_dist.formats.scratch import Planes
from taming_dist.models.autoencoder import (
    GROUPS,
    AttnBlock,
    ConvolutionalDecoder,
    Moments,
    ResnetBlock,
    Upsample,
)
from taming_dist.models.vqgan import VQGAN

MARGIN = 1  # rows above and below that a 3x3 convolution sees; each step has one convolution
HELD = 4  # activations of full resolution that the whole decode holds at once
WHOLE_BYTES = 2**32  # that they may take on the CPU; on a GPU half of its memory
TILE_BYTES = 2**26  # of one of them in a tile


def tile_rows(vqgan: VQGAN, size: tuple[int, int], tile: int | None = None) -> int:
    """Return the rows in which a picture of `size` (h, w) pixels is decoded at a time; 0: all.

    `tile`: their number, or None: 0 while the activations of the whole decode take at most 4 GiB
    on the CPU or half of a GPU's memory, and above that tiles of 64 MiB for each activation.

    Raises:
        UserError: `tile` is negative, or the decoder attends to the whole picture at every layer.
    """
    height, width = size
    if tile is not None and tile < 0:
        raise UserError(f"tile: {tile} rows of pixels, give at least 1, or 0 for no tiles")
    if not isinstance(vqgan.decoder, ConvolutionalDecoder):
        if tile and tile < height:
            raise UserError(
                f"tile={tile}: the decoder of model={vqgan.config.name} has to see the whole "
                f"picture, give 0 for no tiles"
            )
        return 0
    if tile is not None:
        return tile if tile < height else 0
    row = vqgan.decoder.widest * width * vqgan.dtype.itemsize
    if HELD * row * height <= whole_bytes(vqgan.quant_conv.weight.device):
        return 0
    return max(1, TILE_BYTES // row)


def whole_bytes(device: torch.device) -> int:
    """Return what the activations of a whole decode may take on a device."""
    if device.type != "cuda":
        return WHOLE_BYTES
    return torch.cuda.get_device_properties(device).total_memory // 2


@torch.no_grad()
def decode_pictures(
    vqgan: VQGAN, codes: Tensor, tile: int | None = None, scratch: Path | None = None
) -> Tensor:
    """Return the pictures [b, 3, h, w] in [-1, 1] of codes [b, *shape], on their device.

    Pictures that are too large for the whole decode are decoded in tiles, one after the other:
    `tile` as in `tile_rows`, `scratch` as in `decode_tiles`.

    Raises:
        UserError: `tile` is negative, or the disk of the scratch folder is full.
    """
    height, width = size_of(vqgan, codes[0])
    if not tile_rows(vqgan, (height, width), tile):
        return vqgan.config.modality.picture(vqgan.decode_codes(codes)).clamp(-1, 1)
    pictures = torch.empty(len(codes), 3, height, width, device=codes.device)
    for picture, each in zip(pictures, codes, strict=True):
        top = 0
        for part in picture_tiles(vqgan, each, tile, scratch):
            picture[:, top : top + part.shape[1]] = part
            top += part.shape[1]
    return pictures


def picture_tiles(
    vqgan: VQGAN, codes: Tensor, tile: int | None = None, scratch: Path | None = None
) -> Iterator[Tensor]:
    """Yield the picture of codes [*shape] as tiles [3, n, w] in [-1, 1], from the top; as one where
    it is not too large for the whole decode. The rest as in `decode_pictures`."""
    rows = tile_rows(vqgan, size_of(vqgan, codes), tile)
    if not rows:
        yield decode_pictures(vqgan, codes[None], 0)[0]
        return
    for part in decode_tiles(vqgan, codes, rows, scratch):
        yield vqgan.config.modality.picture(part[None])[0].clamp(-1, 1)


def size_of(vqgan: VQGAN, codes: Tensor) -> tuple[int, int]:
    """Return the height and width in pixels of codes [*shape]."""
    return vqgan.config.image_shape(codes.shape)


@torch.no_grad()
def decode_tiles(
    vqgan: VQGAN, codes: Tensor, rows: int, scratch: Path | None = None
) -> Iterator[Tensor]:
    """Yield what `vqgan.decode_codes` gives for codes [*shape] in tiles [c, n, w], from the top.

    n is `rows` but for the last tile, and w the width of the picture. The model is in eval mode.
    `scratch`: the folder of temporary files, by default the system's (TMPDIR). They have no names,
    vanish with the process, and take three activations of full resolution, of which one is as wide
    as what the last level starts with.

    Raises:
        UserError: the disk of the scratch folder is full.
    """
    decoder = vqgan.decoder
    assert isinstance(decoder, ConvolutionalDecoder)
    folder = Path(tempfile.gettempdir()) if scratch is None else scratch
    tiling = Tiling(rows, codes.device, folder)
    entries = vqgan.entries(codes[None])
    x = tiling.stored([decoder.coarse(entries)], entries.shape[2])
    for layer in decoder.layers():
        x = tiling.through(layer, x)

    def image(top: int, bottom: int) -> Tensor:
        return decoder.conv_out(decoder.fine(tiling.read(x, top, bottom), x.moments))

    for tile in tiling.tiles(image, x.height):
        yield tile[0]


@dataclass(frozen=True)
class Stored:
    """Activations of a whole picture in a scratch file, and the moments of their groups."""

    planes: Planes
    moments: Moments

    @property
    def height(self) -> int:
        return self.planes.shape[1]


@dataclass(frozen=True)
class Tiling:
    """Layers on a device in tiles of `rows` rows, which keep what they give in a folder."""

    rows: int
    device: torch.device
    scratch: Path

    def through(self, layer: nn.Module, x: Stored) -> Stored:
        """Return what a layer of the decoder gives."""
        if isinstance(layer, ResnetBlock):
            return self.block(layer, x)
        if isinstance(layer, Upsample):
            return self.upsampled(layer, x)
        if isinstance(layer, AttnBlock):
            return self.stored([layer(self.read(x, 0, x.height))], x.height)
        return x

    def block(self, block: ResnetBlock, x: Stored) -> Stored:
        """Return what a residual block gives."""

        def first(top: int, bottom: int) -> Tensor:
            return block.first(self.read(x, top, bottom), x.moments)

        h = self.stored(self.tiles(first, x.height), x.height)

        def second(top: int, bottom: int) -> Tensor:
            return block.second(self.read(x, top, bottom), self.read(h, top, bottom), h.moments)

        return self.stored(self.tiles(second, x.height), x.height)

    def upsampled(self, upsample: Upsample, x: Stored) -> Stored:
        """Return activations of twice the resolution."""

        def double(top: int, bottom: int) -> Tensor:
            return upsample(self.read(x, top, bottom))

        return self.stored(self.tiles(double, x.height, scale=2), 2 * x.height)

    def tiles(
        self, step: Callable[[int, int], Tensor], height: int, scale: int = 1
    ) -> Iterator[Tensor]:
        """Yield what a step gives [1, c, n * scale, w] for the rows of a layer, tile by tile.

        `step(top, bottom)` computes it from these rows alone. It is asked for a margin as well,
        which is cut off: there the convolution met padding where the picture continues.
        """
        rows = max(1, self.rows // scale)
        for top in range(0, height, rows):
            bottom = min(top + rows, height)
            first, last = max(top - MARGIN, 0), min(bottom + MARGIN, height)
            found = step(first, last)
            yield found[:, :, (top - first) * scale : (bottom - first) * scale]

    def stored(self, tiles: Iterable[Tensor], height: int) -> Stored:
        """Return the layer that tiles [1, c, n, w] make up."""
        planes: Planes | None = None
        parts, top = [], 0
        for tile in tiles:
            _, channels, rows, width = tile.shape
            if planes is None:
                planes = Planes((channels, height, width), tile.dtype, self.scratch)
            parts.append((rows, moments_of(tile)))
            planes.write(top, tile[0].cpu())
            top += rows
        assert planes is not None
        return Stored(planes, joined(parts))

    def read(self, x: Stored, top: int, bottom: int) -> Tensor:
        """Return rows [1, c, n, w] of a layer on the device."""
        return to_device(x.planes.read(top, bottom), self.device)[None]


def moments_of(tile: Tensor) -> Moments:
    """Return the moments of the groups of a tile [1, c, n, w]."""
    groups = tile.float().reshape(GROUPS, -1)
    variance, mean = torch.var_mean(groups, dim=1, correction=0)
    return Moments(mean.double(), variance.double())


def joined(parts: list[tuple[int, Moments]]) -> Moments:
    """Return the moments of a picture from those of its parts, by their numbers of rows."""
    means = torch.stack([moments.mean for _, moments in parts])  # [parts, g]
    variances = torch.stack([moments.variance for _, moments in parts])
    counts = torch.tensor([count for count, _ in parts]).to(means)[:, None]
    shares = counts / counts.sum()
    mean = (shares * means).sum(0)
    return Moments(mean, (shares * (variances + (means - mean).square())).sum(0))
