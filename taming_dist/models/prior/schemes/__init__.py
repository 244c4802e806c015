"""What the transformer learns to predict of an image's tokens, and how it then writes an image.

A scheme is a class and one line in SCHEMES, by the name that `model/scheme=` has.
"""

from taming_dist.models.prior.schemes.interface import (
    LIKELIHOOD,
    Choose,
    Draft,
    Draws,
    KnownTokens,
    Look,
    Network,
    Pair,
    Repeat,
    Scheme,
    Write,
    one_by_one,
    unwatched,
)
from taming_dist.models.prior.schemes.masked import Masked
from taming_dist.models.prior.schemes.next_index import NextIndex
from taming_dist.models.prior.schemes.next_scale import NextScale

__all__ = [
    "LIKELIHOOD",
    "SCHEMES",
    "Choose",
    "Draft",
    "Draws",
    "KnownTokens",
    "Look",
    "Masked",
    "Network",
    "NextIndex",
    "NextScale",
    "Pair",
    "Repeat",
    "Scheme",
    "Write",
    "one_by_one",
    "unwatched",
]

# name in conf/model/scheme -> the scheme; the first is the default
SCHEMES: dict[str, type[Scheme]] = {
    "next_index": NextIndex,
    "masked": Masked,
    "next_scale": NextScale,
}
