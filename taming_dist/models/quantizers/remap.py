"""A quantizer with the codes that are used, and no others: a smaller vocabulary for stage 2.

The original keeps all entries and renumbers the used ones, with a random or an extra number for
the rest. Here the others are taken out, so that a vector whose code was one of them gets the best
of those that stay: deterministic, and every code can be decoded.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from jaxtyping import Int64
from torch import Tensor

from taming_dist.errors import UserError


def keep_used(
    config: Any, state: Mapping[str, Tensor], used: Int64[Tensor, "U"]
) -> tuple[Any, dict[str, Tensor]]:
    """Configuration and state of a quantizer that has the codes `used` only, in that order.

    Raises:
        UserError: none of the quantizer's codes can be left out, or one of the codes does not exist
            or is given twice.
    """
    if config.whole:
        raise UserError(
            f"model.quantizer.name={config.name}: {config.whole}, none of them can be left out"
        )
    ids = used.tolist()
    if not ids or min(ids) < 0 or max(ids) >= config.codes or len(set(ids)) < len(ids):
        raise UserError(
            f"the used codes must be different numbers from 0 to {config.codes - 1}, at least one"
        )
    # single numbers aside
    kept = {
        name: tensor[used] if tensor.ndim and name not in config.without_rows else tensor
        for name, tensor in state.items()
    }
    return dataclasses.replace(config, codes=len(ids)), kept
