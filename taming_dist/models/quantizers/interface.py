"""What every quantizer takes and gives, and what all of them share.

Everything here computes in fp32, whatever the precision of the networks around it.
Legend: b batch, d latent channels, i j latent grid, K codes, N = b*i*j vectors.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Bool, Float, Float32, Int64
from torch import Tensor, nn

from taming_dist.exact import without_autocast

NO_CODE = -1
MOST_CODES = 2**24  # how often each is used is held, and counted in fp32
MOST_CHANNELS = 2**16  # of a latent, far beyond any network's
STRAIGHT_THROUGH = "straight_through"
SMALLEST = 1e-6  # a vector that is shorter has no direction
SEARCH_BYTES = 64 << 20  # the largest block of an N x K matrix that is ever held

Average = Callable[[Tensor], Tensor]  # a mean over all ranks through which gradients flow
ReplaceRows = Callable[[nn.Parameter, Tensor, Tensor], None]  # see `Quantizer.update`


class Statistics(NamedTuple):
    """What `update` and the usage metrics need of one call, to be brought together over all calls.

    counts: how often each code was chosen; sums: sums of the vectors assigned to each code (both
    are added up); candidates: k latents of each image for dead codes (joined in the order of the
    global batch). The last two are None where nobody needs them.
    """

    counts: Float32[Tensor, "K"]
    sums: Float32[Tensor, "K d"] | None = None
    candidates: Float32[Tensor, "b k d"] | None = None


class Quantized(NamedTuple):
    """What a quantizer gives. (A tuple, because ZeRO-3 looks for tensors in tuples only.)

    z_q: what the chosen entries make, with a gradient to z; codes: their indices, of the shape that
    `QuantizerConfig.code_shape` says; loss: the codebook loss; statistics: see there.
    """

    z_q: Float32[Tensor, "b d i j"]
    codes: Int64[Tensor, "b *shape"]
    loss: Float32[Tensor, ""]
    statistics: Statistics


@dataclasses.dataclass
class QuantizerConfig(ABC):
    """Base of the config classes; each has these three as fields, or computes them."""

    without_rows: ClassVar[tuple[str, ...]] = ()  # tensors of the state that have no row per code
    whole: ClassVar[str] = ""  # why none of its codes can be left out; empty: any can

    @property
    @abstractmethod
    def name(self) -> str:
        """Its own, that `model/quantizer=` has."""

    @property
    @abstractmethod
    def codes(self) -> int:
        """Number of codes K."""

    @property
    @abstractmethod
    def dim(self) -> int:
        """Number of latent channels d."""

    def code_shape(self, i: int, j: int) -> tuple[int, ...]:
        """The shape of an image's codes for its latents [d, i, j]: a grid (i, j) of them, several
        (levels, i, j), or a sequence (n,).

        Raises:
            UserError: there are none for latents of that grid; names the key.
        """
        return i, j

    def latent_grid(self, shape: Sequence[int]) -> tuple[int, int]:
        """The grid i, j of the latents whose codes have a shape: the inverse of `code_shape`."""
        i, j = (1, *shape)[-2:]
        return i, j


class StaysFloat32(nn.Module):
    """A module whose numbers stay fp32 when the model around it is cast to bf16 or fp16.

    Rounded entries would give other codes than those that stage 2 was trained on.
    `lean`: it searches for codes by a kernel of our own (see `nearest`).
    """

    lean = False

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "StaysFloat32":
        def keeping_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(keeping_dtype, recurse)
        return self


class Quantizer(StaysFloat32):
    """What the VQGAN and the recipe know of a quantizer: latents z -> Quantized.

    `average` is set by whoever trains on several ranks (models know no ranks); terms that speak of
    the whole batch use it.
    """

    vocabulary: int
    dim: int
    average: Average | None = None

    def encode(self, z: Float[Tensor, "b d i j"]) -> Int64[Tensor, "b *shape"]:
        """Latents -> codes: those of `forward` in evaluation, nothing beside.

        A latent that is not finite has none: -1, in a sequence throughout.
        """
        with torch.no_grad(), full_precision(z) as z32:
            codes = self._codes_of(z32)
            return codes.where(_has_codes(z32.isfinite().all(1), codes), NO_CODE)

    def _codes_of(self, z: Float32[Tensor, "b d i j"]) -> Int64[Tensor, "b *shape"]:
        """The codes of latents, as evaluation chooses them."""
        raise NotImplementedError

    def lookup(self, codes: Int64[Tensor, "b *shape"]) -> Float32[Tensor, "b d i j"]:
        """Codes -> what their entries make."""
        raise NotImplementedError

    def anneal(self, progress: float) -> dict[str, float]:
        """Set what changes over a run, from the share of it that is done (0 to 1); gives it by
        name, for the log."""
        return {}

    def update(
        self, statistics: Statistics, generator: torch.Generator, replace_rows: ReplaceRows
    ) -> int | Int64[Tensor, ""]:
        """Take in the statistics of a whole optimizer step over all ranks; gives how many codes
        were restarted.

        `replace_rows(parameter, rows [K], values [K,...])` writes those rows of a parameter that an
        optimizer owns whose flag is set, and makes the optimizer forget what it knew of them. Every
        shape here is static, and nothing is asked of the device: the host does not wait. (For a
        step that is skipped the caller takes back what this does to buffers and rows.)
        """
        return 0


def _has_codes(
    finite: Bool[Tensor, "b i j"], codes: Int64[Tensor, "b *shape"]
) -> Bool[Tensor, "b *other"]:
    """Which codes are of finite latents, to broadcast against the codes."""
    if codes.ndim == 2:  # every code of a sequence may be of every latent
        return finite.flatten(1).all(1, keepdim=True)
    return finite.unsqueeze(1) if codes.ndim == 4 else finite


@contextmanager
def full_precision(z: Float[Tensor, "b d i j"]) -> Iterator[Float32[Tensor, "b d i j"]]:
    """The latents in fp32, with autocast off.

    One that is not finite becomes NaN: its code is any of the vocabulary and means nothing, and the
    reconstruction is NaN there, infinity included, which some quantizers would bound. So the loss
    tells, and nobody waits for the device here.
    """
    with without_autocast(z.device):
        z = z.float()
        yield z.where(z.isfinite(), torch.nan)


def as_vectors(
    z: Float32[Tensor, "b d i j"], normalized: bool = False, parts: int = 1
) -> Float32[Tensor, "N c"]:
    """Each latent as a row, or as a row for each of equal `parts` of its channels one after the
    other; `normalized` to unit length."""
    vectors = rearrange(z, "b (parts c) i j -> (b i j parts) c", parts=parts)
    return F.normalize(vectors, dim=-1) if normalized else vectors


def as_grid(
    vectors: Float32[Tensor, "N c"], z: Float[Tensor, "b d i j"]
) -> Float32[Tensor, "b d i j"]:
    """The inverse of `as_vectors`, with the sizes of z."""
    b, _, i, j = z.shape
    return rearrange(vectors, "(b i j parts) c -> b (parts c) i j", b=b, i=i, j=j)


def as_code_grid(codes: Int64[Tensor, "N"], z: Float[Tensor, "b d i j"]) -> Int64[Tensor, "b i j"]:
    """The codes of rows as a grid, with the sizes of z."""
    return codes.view(len(z), *z.shape[2:])


def straight_through(
    vectors: Float32[Tensor, "*size"], entries: Float32[Tensor, "*size"]
) -> Float32[Tensor, "*size"]:
    """The value of the entries with the gradient of the vectors."""
    return vectors + (entries - vectors).detach()


def rotated(
    vectors: Float32[Tensor, "N d"], entries: Float32[Tensor, "N d"]
) -> Float32[Tensor, "N d"]:
    """The value of the entries; the gradient is that of the rotation and scaling, taken as
    constant, which bring each vector to its entry: it keeps its angle to the vector. Source: arXiv
    2410.06424, section 4.2, by two reflections."""
    with torch.no_grad():
        lengths = vectors.norm(dim=-1, keepdim=True).clamp(min=SMALLEST)
        theirs = entries.norm(dim=-1, keepdim=True).clamp(min=SMALLEST)
        origin, target = vectors / lengths, entries / theirs
        between = F.normalize(origin + target, dim=-1, eps=SMALLEST)
        scale = theirs / lengths
    reflected = vectors - 2 * (vectors * between).sum(-1, keepdim=True) * between
    turned = scale * (reflected + 2 * (vectors * origin).sum(-1, keepdim=True) * target)
    return straight_through(turned, entries)


GRADIENTS = {STRAIGHT_THROUGH: straight_through, "rotation": rotated}


def rows_per_block(codes: int) -> int:
    """How many vectors are compared with all codes at once."""
    return max(1, SEARCH_BYTES // (4 * codes))


def nearest(
    z: Float32[Tensor, "N d"], entries: Float32[Tensor, "K d"], lean: bool = False
) -> Int64[Tensor, "N"]:
    """Index of the nearest entry for every vector.

    The distances are taken in blocks of rows, so that N*K numbers are never held at once; `lean`:
    by `taming_dist.kernels.nearest`, which needs a GPU and never holds them. Ties go to the lowest
    index.
    """
    if lean:
        from taming_dist.kernels.nearest import nearest as by_kernel

        return by_kernel(z, entries)
    squared = entries.square().sum(1)
    # |z|^2 is the same for every entry and is left out
    return torch.cat(
        [
            torch.argmin(torch.addmm(squared, part, entries.T, alpha=-2), 1)
            for part in z.split(rows_per_block(len(entries)))
        ]
    )


def count(codes: Int64[Tensor, "..."], vocabulary: int) -> Float32[Tensor, "{vocabulary}"]:
    """How often each code occurs (exact up to 2^24 per call).

    Not by `bincount`, for which the host waits until a GPU has told the largest code.
    """
    ones = torch.ones(codes.numel(), dtype=torch.float32, device=codes.device)
    return ones.new_zeros(vocabulary).index_add_(0, codes.flatten(), ones)
