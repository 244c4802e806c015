"""Index backpropagation: every entry gets a gradient at every step, through the softmax over codes.

Source: arXiv 2412.02692, section 3.2, equations 4 to 7.
Legend: b batch, d latent channels, i j latent grid, K codes, N = b*i*j vectors.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Float32, Int64
from omegaconf import MISSING
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from taming_dist.exact import without_autocast
from taming_dist.models.quantizers.entropy import EntropyQuantizer
from taming_dist.models.quantizers.interface import (
    MOST_CHANNELS,
    MOST_CODES,
    Quantized,
    QuantizerConfig,
    Statistics,
    as_code_grid,
    as_grid,
    as_vectors,
    count,
    full_precision,
    rows_per_block,
)
from taming_dist.ranges import check_ranges, ranged


@dataclasses.dataclass
class IndexQuantizerConfig(QuantizerConfig):
    """`beta` of the commitment term; `entropy_weight` of E[H(q(z))] - `diversity` * H(E[q(z)]),
    with q(c|z) = softmax(z.c / `temperature`)."""

    name: str = "ibq"
    codes: int = ranged(MISSING, at_least=1, at_most=MOST_CODES)
    dim: int = ranged(MISSING, at_least=1, at_most=MOST_CHANNELS)
    beta: float = ranged(0.25, at_least=0, compared=False)
    entropy_weight: float = ranged(0.05, at_least=0, compared=False)
    diversity: float = ranged(1.0, at_least=0, compared=False)
    temperature: float = ranged(0.01, above=0, compared=False)

    def __post_init__(self) -> None:
        check_ranges(self, "model.quantizer")


class Chosen(NamedTuple):
    """Of n vectors: codes; entries, with a gradient to the chosen entries only; z_q, the same
    values with a gradient to all of them; the sum of the entropies of q(c|z), and that of q.
    """

    codes: Int64[Tensor, "n"]
    entries: Float32[Tensor, "n d"]
    z_q: Float32[Tensor, "n d"]
    entropy: Float32[Tensor, ""]
    mass: Float32[Tensor, "K"]


class IndexCodebook(nn.Module):
    """The entries; the weight is used in this module's own forward, where ZeRO-3 has it."""

    def __init__(self, codes: int, dim: int, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature
        self.weight = nn.Parameter(torch.empty(codes, dim).uniform_(-1 / codes, 1 / codes))

    def forward(
        self,
        z: Float32[Tensor, "N d"] | None,
        codes: Int64[Tensor, "*size"] | None = None,
        codes_only: bool = False,
    ) -> Chosen | Int64[Tensor, "N"] | Float32[Tensor, "*size d"]:
        """Vectors -> what is chosen for them, or their codes only; or codes -> their entries."""
        if codes is not None:
            return F.embedding(codes, self.weight)
        assert z is not None
        if z.is_meta:
            return self._counted(z)
        if codes_only:
            found = z.new_empty(len(z), dtype=torch.int64)
            for rows, (logits,) in _blocks(z, self.weight, 1):
                found[rows] = torch.mm(z[rows], self.weight.T, out=logits).argmax(1)
            return found
        chosen, *rest = _Choice.apply(z, self.weight, self.temperature)
        return Chosen(chosen, F.embedding(chosen, self.weight), *rest)

    def _counted(self, z: Float32[Tensor, "N d"]) -> Chosen:
        """The products of both passes, where they are only counted: that of the logits, and what
        stands for that of the gradient at their softmax."""
        logits = z @ self.weight.T
        with torch.no_grad():
            z @ self.weight.T
        codes = logits.argmax(1)
        entries = F.embedding(codes, self.weight)
        return Chosen(codes, entries, entries, logits.sum(), logits.sum(0))


class _Choice(torch.autograd.Function):
    """Vectors z, entries, temperature -> `Chosen` without `entries`.

    The N x K matrix is taken in blocks of rows, which are computed again in the backward pass
    instead of being kept. All blocks have the same few pieces of memory: with new ones for each,
    what is kept of a block lies in what an earlier one has freed, so that the next block does not
    fit there, and the process grows by the whole matrix.
    """

    @staticmethod
    def forward(
        ctx: Any, z: Float32[Tensor, "N d"], entries: Float32[Tensor, "K d"], temperature: float
    ) -> tuple[
        Int64[Tensor, "N"], Float32[Tensor, "N d"], Float32[Tensor, ""], Float32[Tensor, "K"]
    ]:
        codes = z.new_empty(len(z), dtype=torch.int64)
        entropy, mass = z.new_zeros(()), z.new_zeros(len(entries))
        for rows, (logits, q) in _blocks(z, entries, 2):
            torch.mm(z[rows], entries.T, out=logits)
            codes[rows] = logits.argmax(1)
            log_sum = _softmax(logits.div_(temperature), q)
            mass += q.sum(0)
            entropy += (log_sum - logits.mul_(q).sum(1, keepdim=True)).sum()
        ctx.save_for_backward(z, entries, codes)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(codes)
        ctx.set_materialize_grads(False)
        z_q = F.embedding(codes, entries)
        known = z.isfinite().all(1, keepdim=True)  # else it is NaN, as its softmax would be
        return codes, z_q.where(known, torch.nan), entropy, mass

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any,
        _: Any,
        of_z_q: Float32[Tensor, "N d"] | None,
        of_entropy: Float32[Tensor, ""] | None,
        of_mass: Float32[Tensor, "K"] | None,
    ) -> tuple[Float32[Tensor, "N d"], Float32[Tensor, "K d"], None]:
        """By the derivative one-hot - sg[p] + p of the choice (equation 5), and those of q."""
        z, entries, codes = ctx.saved_tensors
        of_z, of_entries = torch.empty_like(z), torch.zeros_like(entries)
        if of_z_q is not None:
            of_entries.index_add_(0, codes, of_z_q)
        of_q = of_entropy is not None or of_mass is not None
        of_entropy = z.new_zeros(()) if of_entropy is None else of_entropy
        of_mass = z.new_zeros(len(entries)) if of_mass is None else of_mass
        with without_autocast(z.device):
            for rows, (logits, p, gradient) in _blocks(z, entries, 3):
                torch.mm(z[rows], entries.T, out=logits)
                gradient.zero_()
                if of_z_q is not None:
                    torch.mm(of_z_q[rows], entries.T, out=gradient)
                    _softmax(logits, p)
                    _through_softmax(p, gradient)
                if of_q:
                    _softmax(logits.div_(ctx.temperature), p)
                    logits.mul_(-of_entropy).add_(of_mass)
                    _through_softmax(p, logits)
                    gradient.add_(logits, alpha=1 / ctx.temperature)
                torch.mm(gradient, entries, out=of_z[rows])
                torch.addmm(of_entries, gradient.T, z[rows], out=of_entries)
        return of_z, of_entries, None


def _blocks(
    z: Float32[Tensor, "N d"], entries: Float32[Tensor, "K d"], count: int
) -> Iterator[tuple[slice, Float32[Tensor, "count n K"]]]:
    """Yield blocks of rows of the N x K matrix, and the same memory for so many of them each."""
    most = min(rows_per_block(len(entries)), len(z))
    memory = z.new_empty(count, most, len(entries))
    for start in range(0, len(z), most):
        rows = slice(start, min(start + most, len(z)))
        yield rows, memory[:, : rows.stop - start]


def _softmax(x: Float32[Tensor, "n K"], out: Float32[Tensor, "n K"]) -> Float32[Tensor, "n 1"]:
    """Write the softmax of each row to `out`; x loses its largest value from each, and what comes
    back is the logarithm of the sum of its exponentials then."""
    x.sub_(x.amax(1, keepdim=True))
    total = torch.exp(x, out=out).sum(1, keepdim=True)
    out.div_(total)
    return total.log()


def _through_softmax(p: Float32[Tensor, "n K"], gradient: Float32[Tensor, "n K"]) -> None:
    """Make the gradient at each row's logits of that at its softmax p, in place."""
    gradient.mul_(p)
    gradient.addcmul_(p, gradient.sum(1, keepdim=True), value=-1)


class IndexQuantizer(EntropyQuantizer):
    """The code with the largest inner product; the gradient of z_q goes back through the softmax
    over all codes to z and to every entry."""

    def __init__(self, config: IndexQuantizerConfig) -> None:
        super().__init__()
        self.vocabulary, self.dim, self.beta = config.codes, config.dim, config.beta
        self.entropy_weight, self.diversity = config.entropy_weight, config.diversity
        self.embedding = IndexCodebook(config.codes, config.dim, config.temperature)

    def forward(self, z: Float[Tensor, "b d i j"]) -> Quantized:
        with full_precision(z) as z32:
            flat = as_vectors(z32)
            chosen = self.embedding(flat)
            loss = (
                F.mse_loss(chosen.z_q, flat)
                + F.mse_loss(flat, chosen.entries.detach())
                + self.beta * F.mse_loss(chosen.entries, flat.detach())
            )
            if self.training:
                n = len(flat)
                loss = loss + self.entropy_term(chosen.entropy / n, chosen.mass / n)
            return Quantized(
                z_q=as_grid(chosen.z_q, z),
                codes=as_code_grid(chosen.codes, z),
                loss=loss,
                statistics=Statistics(count(chosen.codes, self.vocabulary)),
            )

    def _codes_of(self, z: Float32[Tensor, "b d i j"]) -> Int64[Tensor, "b i j"]:
        return as_code_grid(self.embedding(as_vectors(z), codes_only=True), z)

    def lookup(self, codes: Int64[Tensor, "b i j"]) -> Float32[Tensor, "b d i j"]:
        return rearrange(self.embedding(None, codes), "b i j d -> b d i j")
