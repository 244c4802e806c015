"""Attention on the CPU by a few large products, and its gradient: those of torch's SDPA.

SDPA makes many small products of each head. On processors that are not Intel's these take two to
four times as long, in the gradient most (docs/speed.md). Here all heads are one batch, some queries
at a time, so that of causal attention nothing is computed that no query sees. The probabilities are
kept where a gradient is wanted. Arithmetic: arXiv 1706.03762, equation 1.

Legend: n heads of all sequences together, t positions, d width of a head.
"""

from collections.abc import Iterator
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from taming_dist.kernels.processor import by_mkl, mkl_is_slow

QUERIES = 128  # at a time
LEAST, MOST = 16, 512  # positions: fewer are as fast in SDPA, the probabilities of more too large


def pays(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether `attention` takes them, and faster than SDPA: on the CPU where oneDNN multiplies, as
    many queries as keys. Not while torch compiles."""
    return (
        not torch.compiler.is_compiling()
        and type(query) is Tensor  # none that only stands for one, as where operations are counted
        and query.device.type == "cpu"
        and query.dtype == key.dtype == value.dtype
        and query.dtype in (torch.float32, torch.bfloat16)
        and query.shape == key.shape == value.shape
        and LEAST <= query.shape[2] <= MOST
        and mkl_is_slow()
    )


def sdpa(query: Tensor, key: Tensor, value: Tensor, **how: Any) -> Tensor:
    """torch's SDPA; of few queries, as when a token is sampled, by MKL, for oneDNN takes several
    times as long for their small products."""
    if (
        not torch.compiler.is_compiling()
        and query.device.type == "cpu"
        and query.shape[2] < LEAST
        and mkl_is_slow()
    ):
        with by_mkl():
            return F.scaled_dot_product_attention(query, key, value, **how)
    return F.scaled_dot_product_attention(query, key, value, **how)


def attention(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
    """What queries [b,heads,t,d] read, those at a position with `causal` of the keys up to it;
    differentiable once."""
    found: Tensor = _Attention.apply(query, key, value, causal)
    return found


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            q, k, v = (
                query.flatten(0, 1) * query.shape[3] ** -0.5,
                key.flatten(0, 1),
                value.flatten(0, 1),
            )
            y, kept = torch.empty_like(q), []
            for rows, seen in _blocks(q.shape[1], causal):
                scores = q[:, rows] @ k[:, :seen].mT
                if causal:
                    scores[:, :, rows].masked_fill_(_later(scores.shape[1]), -torch.inf)
                probabilities = scores.softmax(2)
                y[:, rows] = probabilities @ v[:, :seen]
                if any(ctx.needs_input_grad):
                    kept.append(probabilities)
        ctx.save_for_backward(q, k, v, y, *kept)
        ctx.causal = causal
        return y.view_as(query)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, y, *kept = ctx.saved_tensors
        (b, heads), dy = gradients[0].shape[:2], gradients[0].flatten(0, 1)
        dq, dk, dv = (torch.zeros_like(each) for each in (q, k, v))
        with torch.autocast("cpu", enabled=False):
            mean = (dy.float() * y.float()).sum(2, keepdim=True).to(q.dtype)
            for (rows, seen), p in zip(_blocks(q.shape[1], ctx.causal), kept, strict=True):
                of_scores = (dy[:, rows] @ v[:, :seen].mT).sub_(mean[:, rows]).mul_(p)
                dq[:, rows] = of_scores @ k[:, :seen]
                dk[:, :seen] += of_scores.mT @ q[:, rows]
                dv[:, :seen] += p.mT @ dy[:, rows]
        dq *= q.shape[2] ** -0.5
        return *(each.unflatten(0, (b, heads)) for each in (dq, dk, dv)), None


def _blocks(positions: int, causal: bool) -> Iterator[tuple[slice, int]]:
    """Queries, and how many keys any of them sees."""
    for first in range(0, positions, QUERIES):
        last = min(first + QUERIES, positions)
        yield slice(first, last), last if causal else positions


@cache
def _later(count: int) -> Tensor:
    """True where a key [count] is behind a query [count]."""
    return torch.ones(count, count, dtype=torch.bool).triu(1)
