"""What every quantizer takes and gives, and what all of them share.

Everything here computes in fp32, whatever the precision of the networks around it.
Legend: b batch, d latent channels, i j latent grid, K codes, N = b*i*j vectors.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

NO_CODE = -1
MOST_CODES = 2**24  # how often each is used is held, and counted in fp32
SEARCH_BYTES = 64 << 20  # the largest block of an N x K matrix that is ever held

Average = Callable[[Tensor], Tensor]  # a mean over all ranks through which gradients flow
ReplaceRows = Callable[[nn.Parameter, Tensor, Tensor], None]  # see `Quantizer.update`


class Statistics(NamedTuple):
    """What `update` and the usage metrics need of one call, to be brought together over all calls.

    counts [K]: how often each code was chosen; sums [K,d]: sums of the vectors assigned to each
    code (both are added up); candidates [b,k,d]: a few latents of each image for dead codes
    (joined in the order of the global batch). The last two are None where nobody needs them.
    """

    counts: Tensor
    sums: Tensor | None = None
    candidates: Tensor | None = None


class Quantized(NamedTuple):
    """What a quantizer gives. (A tuple, because ZeRO-3 looks for tensors in tuples only.)

    z_q [b,d,i,j]: the chosen entries, with a gradient to z (fp32); codes [b,i,j]: their indices,
    int64; loss: the codebook loss, a scalar; statistics: see there.
    """

    z_q: Tensor
    codes: Tensor
    loss: Tensor
    statistics: Statistics


class StaysFloat32(nn.Module):
    """A module whose numbers stay fp32 when the model around it is cast to bf16 or fp16.

    Rounded entries would give other codes than those that stage 2 was trained on.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "StaysFloat32":
        def keeping_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(keeping_dtype, recurse)
        return self


class Quantizer(StaysFloat32):
    """What the VQGAN and the recipe know of a quantizer: z [b,d,i,j] -> Quantized.

    `average` is set by whoever trains on several ranks (models know no ranks); terms that speak of
    the whole batch use it.
    """

    vocabulary: int
    dim: int
    average: Average | None = None

    def encode(self, z: Tensor) -> Tensor:
        """z [b,d,i,j] -> codes [b,i,j], int64: those of `forward` in evaluation, nothing beside.

        A latent that is not finite has none: -1.
        """
        with torch.no_grad(), full_precision(z) as z32:
            return self._codes_of(z32).where(z32.isfinite().all(1), NO_CODE)

    def _codes_of(self, z: Tensor) -> Tensor:
        """The codes [b,i,j] of latents [b,d,i,j] in fp32, as evaluation chooses them."""
        raise NotImplementedError

    def lookup(self, codes: Tensor) -> Tensor:
        """Codes [b,i,j] -> entries [b,d,i,j], fp32."""
        raise NotImplementedError

    def anneal(self, progress: float) -> dict[str, float]:
        """Set what changes over a run, from the share of it that is done (0 to 1); gives it by
        name, for the log."""
        return {}

    def update(
        self, statistics: Statistics, generator: torch.Generator, replace_rows: ReplaceRows
    ) -> int:
        """Take in the statistics of a whole optimizer step over all ranks; gives revived codes.

        `replace_rows(parameter, rows [m], values [m,...])` writes rows of a parameter that an
        optimizer owns and makes the optimizer forget what it knew of them.
        """
        return 0


@contextmanager
def full_precision(z: Tensor) -> Iterator[Tensor]:
    """The latents in fp32, with autocast off.

    One that is not finite becomes NaN: its code is any of the vocabulary and means nothing, and the
    reconstruction is NaN there, infinity included, which some quantizers would bound. So the loss
    tells, and nobody waits for the device here.
    """
    with torch.autocast(z.device.type, enabled=False):
        z = z.float()
        yield z.where(z.isfinite(), torch.nan)


def as_vectors(z: Tensor, normalized: bool = False) -> Tensor:
    """[b,d,i,j] -> [N,d], `normalized` to unit length."""
    vectors = rearrange(z, "b d i j -> (b i j) d")
    return F.normalize(vectors, dim=-1) if normalized else vectors


def as_grid(vectors: Tensor, z: Tensor) -> Tensor:
    """[N,d] -> [b,d,i,j], with the sizes of z."""
    b, _, i, j = z.shape
    return rearrange(vectors, "(b i j) d -> b d i j", b=b, i=i, j=j)


def as_code_grid(codes: Tensor, z: Tensor) -> Tensor:
    """[N] -> [b,i,j], with the sizes of z."""
    return codes.view(len(z), *z.shape[2:])


def straight_through(vectors: Tensor, entries: Tensor) -> Tensor:
    """The value of the entries with the gradient of the vectors."""
    return vectors + (entries - vectors).detach()


def rows_per_block(codes: int) -> int:
    """How many vectors are compared with all codes at once."""
    return max(1, SEARCH_BYTES // (4 * codes))


def nearest(z: Tensor, entries: Tensor) -> Tensor:
    """Index of the nearest entry for every vector: z [N,d], entries [K,d] -> [N] int64.

    The distances are taken in blocks of rows, so that N*K numbers are never held at once. Ties go
    to the lowest index.
    """
    squared = entries.square().sum(1)
    # |z|^2 is the same for every entry and is left out
    return torch.cat(
        [
            torch.argmin(torch.addmm(squared, part, entries.T, alpha=-2), 1)
            for part in z.split(rows_per_block(len(entries)))
        ]
    )


def count(codes: Tensor, vocabulary: int) -> Tensor:
    """How often each code occurs: [K] float32 (exact up to 2^24 per call).

    Not by `bincount`, for which the host waits until a GPU has told the largest code.
    """
    ones = torch.ones(codes.numel(), dtype=torch.float32, device=codes.device)
    return ones.new_zeros(vocabulary).index_add_(0, codes.flatten(), ones)
