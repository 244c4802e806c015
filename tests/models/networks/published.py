"""Tokenizers that others have published, written down plainly: the names of their tensors are those
of the files, and their answers are what an import has to give.

Sources: the layouts of maskgit-vqgan-imagenet-f16-256.bin (arXiv 2202.04200) and of LlamaGen's
vq_ds16_c2i.pt (arXiv 2406.06525).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=1e-6)


def nearest(z: Tensor, entries: Tensor) -> Tensor:
    """Codes [b,i,j] of latents [b,d,i,j]."""
    vectors = z.movedim(1, -1)
    return (vectors.unsqueeze(-2) - entries).square().sum(-1).argmin(-1)


class Residual(nn.Module):
    """`published`: convolutions without biases, and a shortcut of the answer, as MaskGIT's."""

    def __init__(self, channels: int, out: int, published: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = norm(channels), norm(out)
        self.conv1 = nn.Conv2d(channels, out, 3, padding=1, bias=not published)
        self.conv2 = nn.Conv2d(out, out, 3, padding=1, bias=not published)
        self.published = published
        if channels != out:
            inputs = out if published else channels
            self.nin_shortcut = nn.Conv2d(inputs, out, 1, bias=not published)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        if hasattr(self, "nin_shortcut"):
            x = self.nin_shortcut(h if self.published else x)
        return h + x


class MaskGITLevel(nn.Module):
    def __init__(self, channels: int, out: int, blocks: int, upsamples: bool) -> None:
        super().__init__()
        widths = [channels] + [out] * blocks
        self.block = nn.ModuleList(Residual(widths[n], widths[n + 1], True) for n in range(blocks))
        if upsamples:
            self.upsample_conv = nn.Conv2d(out, out, 3, padding=1)


class MaskGITHalf(nn.Module):
    """The encoder, or the decoder with `up`."""

    def __init__(self, images: int, ch: int, mult: tuple[int, ...], blocks: int, z: int, up: bool):
        super().__init__()
        top, last = ch * mult[-1], len(mult) - 1
        levels: list[nn.Module] = []
        if up:
            self.conv_in = nn.Conv2d(z, top, 3, padding=1)
            for n in range(len(mult)):
                width = ch * mult[min(n + 1, last)]
                levels.append(MaskGITLevel(width, ch * mult[n], blocks, n > 0))
            self.up = nn.ModuleList(levels)
            self.norm_out = norm(ch * mult[0])
            self.conv_out = nn.Conv2d(ch * mult[0], images, 3, padding=1)
        else:
            self.conv_in = nn.Conv2d(images, ch, 3, padding=1, bias=False)
            for n in range(len(mult)):
                levels.append(MaskGITLevel(ch * (1, *mult)[n], ch * mult[n], blocks, False))
            self.down = nn.ModuleList(levels)
            self.norm_out = norm(top)
            self.conv_out = nn.Conv2d(top, z, 1)
        self.mid = nn.ModuleList(Residual(top, top, True) for _ in range(blocks))


class MaskGIT(nn.Module):
    """Images in [0,1]."""

    def __init__(self, ch: int, mult: tuple[int, ...], blocks: int, z: int, codes: int) -> None:
        super().__init__()
        self.encoder = MaskGITHalf(3, ch, mult, blocks, z, up=False)
        self.decoder = MaskGITHalf(3, ch, mult, blocks, z, up=True)
        self.quantize = nn.Module()
        self.quantize.embedding = nn.Embedding(codes, z)

    def encode(self, x: Tensor) -> Tensor:
        part = self.encoder
        h = part.conv_in(x)
        for number, level in enumerate(part.down):
            for block in level.block:
                h = block(h)
            if number < len(part.down) - 1:
                h = F.avg_pool2d(h, 2)
        for block in part.mid:
            h = block(h)
        return nearest(part.conv_out(F.silu(part.norm_out(h))), self.quantize.embedding.weight)

    def decode(self, codes: Tensor) -> Tensor:
        part = self.decoder
        h = part.conv_in(self.quantize.embedding(codes).movedim(-1, 1))
        for block in part.mid:
            h = block(h)
        for number in reversed(range(len(part.up))):
            for block in part.up[number].block:
                h = block(h)
            if number:
                h = part.up[number].upsample_conv(F.interpolate(h, scale_factor=2.0))
        return part.conv_out(F.silu(part.norm_out(h)))


class Attention(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in "qkvo")

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2) for layer in (self.q, self.k, self.v))
        weights = torch.softmax(q.transpose(1, 2) @ k * x.shape[1] ** -0.5, 2)
        return x + self.proj_out((v @ weights.transpose(1, 2)).view_as(x))


class LlamaGenHalf(nn.Module):
    """The encoder, or the decoder with `up`, whose levels are numbered from the lowest resolution;
    only there is attention."""

    def __init__(self, ch: int, mult: tuple[int, ...], blocks: int, z: int, up: bool) -> None:
        super().__init__()
        top, last = ch * mult[-1], len(mult) - 1
        self.conv_in = nn.Conv2d(z if up else 3, top if up else ch, 3, padding=1)
        width, levels = top if up else ch, []
        for n in reversed(range(len(mult))) if up else range(len(mult)):
            level = nn.Module()
            level.res, level.attn = nn.ModuleList(), nn.ModuleList()
            for _ in range(blocks + up):
                level.res.append(Residual(width, ch * mult[n], False))
                width = ch * mult[n]
                if n == last:
                    level.attn.append(Attention(width))
            resized = nn.Module()
            resized.conv = nn.Conv2d(width, width, 3, stride=1 if up else 2, padding=int(up))
            if up and n > 0:
                level.upsample = resized
            if not up and n < last:
                level.downsample = resized
            levels.append(level)
        self.conv_blocks = nn.ModuleList(levels)
        self.mid = nn.ModuleList(
            [Residual(top, top, False), Attention(top), Residual(top, top, False)]
        )
        self.norm_out = norm(width)
        self.conv_out = nn.Conv2d(width, 3 if up else z, 3, padding=1)

    def through(self, h: Tensor) -> Tensor:
        """The levels."""
        for level in self.conv_blocks:
            for number, block in enumerate(level.res):
                h = block(h)
                if len(level.attn):
                    h = level.attn[number](h)
            if hasattr(level, "downsample"):
                h = level.downsample.conv(F.pad(h, (0, 1, 0, 1)))
            if hasattr(level, "upsample"):
                h = level.upsample.conv(F.interpolate(h, scale_factor=2.0))
        return h

    def middle(self, h: Tensor) -> Tensor:
        for block in self.mid:
            h = block(h)
        return h

    def end(self, h: Tensor) -> Tensor:
        return self.conv_out(F.silu(self.norm_out(h)))


class LlamaGen(nn.Module):
    """Images in [-1,1]."""

    def __init__(
        self, ch: int, mult: tuple[int, ...], blocks: int, z: int, codes: int, dim: int
    ) -> None:
        super().__init__()
        self.encoder = LlamaGenHalf(ch, mult, blocks, z, up=False)
        self.decoder = LlamaGenHalf(ch, mult, blocks, z, up=True)
        self.quantize = nn.Module()
        self.quantize.embedding = nn.Embedding(codes, dim)
        self.quantize.register_buffer("codebook_used", torch.zeros(16))
        self.quant_conv = nn.Conv2d(z, dim, 1)
        self.post_quant_conv = nn.Conv2d(dim, z, 1)

    def entries(self) -> Tensor:
        return F.normalize(self.quantize.embedding.weight, dim=-1)

    def encode(self, x: Tensor) -> Tensor:
        part = self.encoder
        z = self.quant_conv(part.end(part.middle(part.through(part.conv_in(x)))))
        return nearest(F.normalize(z, dim=1), self.entries())

    def decode(self, codes: Tensor) -> Tensor:
        part = self.decoder
        z = self.post_quant_conv(self.entries()[codes].movedim(-1, 1))
        return part.end(part.through(part.middle(part.conv_in(z))))
