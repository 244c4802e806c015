"""Attention without a mask in memory, for all kinds of block.

Legend: b batch, t queries, s keys, c width, d width of a head.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from taming_dist.kernels import attention_cpu


def attend(
    query: Float[Tensor, "b heads t d"],
    key: Float[Tensor, "b heads s d"],
    value: Float[Tensor, "b heads s d"],
    causal: bool,
    dropout: float = 0.0,
    unmasked: int = 0,
    mask: Float[Tensor, "*a t s"] | Bool[Tensor, "t s"] | None = None,
    fast: bool = True,
) -> Float[Tensor, "b t c"]:
    """Return what the queries read, their heads side by side.

    Queries are those of the last t of s positions. With `causal` the query at position p sees the
    keys up to p; the first `unmasked` positions see each other, too, where all are queries. `mask`,
    added to the scores, or true where keys are seen, says it instead. `fast`: by a kernel of ours
    where that pays (`models.quick`).
    """
    positions, total = query.shape[2], key.shape[2]
    if mask is not None:
        out = attention_cpu.sdpa(query, key, value, attn_mask=mask, dropout_p=dropout)
    elif not causal or positions == 1 or positions == total <= unmasked:
        out = _whole(query, key, value, causal=False, dropout=dropout, fast=fast)
    elif positions < total:
        seen = query.new_ones(positions, total, dtype=torch.bool).tril(total - positions)
        out = attention_cpu.sdpa(query, key, value, attn_mask=seen)
    else:
        out = _whole(query, key, value, causal=True, dropout=dropout, fast=fast)
        if unmasked:
            # A mask that is neither full nor causal would have to lie in memory, and shut the
            # fast kernels out; these positions are few, so what is causal of them is thrown away.
            first = slice(unmasked)
            few = query[:, :, first], key[:, :, first], value[:, :, first]
            seen = _whole(few[0], few[1], few[2], causal=False, dropout=dropout, fast=fast)
            out = torch.cat([seen, out[:, :, unmasked:]], dim=2)
    return out.transpose(1, 2).flatten(2)


def _whole(
    query: Float[Tensor, "b heads t d"],
    key: Float[Tensor, "b heads s d"],
    value: Float[Tensor, "b heads s d"],
    causal: bool,
    dropout: float,
    fast: bool,
) -> Float[Tensor, "b heads t d"]:
    """Attention of all queries, causal or to all keys."""
    if fast and not dropout and attention_cpu.pays(query, key, value):
        return attention_cpu.attention(query, key, value, causal)
    return attention_cpu.sdpa(query, key, value, dropout_p=dropout, is_causal=causal)
