"""Random numbers of images: a pure function of the seed, the image and the position.

They come from Philox4x32-10, a counter-based generator in integer operations (Salmon et al.,
"Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 4.1): every device gives the same
bits, for any images in any order, and nothing is carried from one number to the next.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from taming_dist.copies import to_device

ROUNDS = 10
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
LOW = 0xFFFFFFFF
Words = tuple[Tensor, Tensor, Tensor, Tensor]


def uniforms(seed: int, images: Sequence[int], count: int, device: torch.device) -> Tensor:
    """Return uniforms [b, count] fp64 on [0, 1), multiples of 2^-53, for images of a seed.

    The one in row r and column k depends on the seed (modulo 2^64), images[r] (below 2^63) and k
    alone. On the device, which computes them without the host waiting.
    """
    rows = to_device(numbers(images), device)[:, None]
    position = torch.arange(count, device=device)[None]
    nothing = torch.zeros_like(position)
    low, high, *_ = philox((position, nothing, rows & LOW, rows >> 32), seed & LOW, seed >> 32)
    return ((high << 21) | (low >> 11)).double() * 2.0**-53


def numbers(images: Sequence[int]) -> Tensor:
    """Return the images' numbers [b] int64, on the CPU."""
    return torch.tensor(images, dtype=torch.int64)


def philox(counter: Words, *key: int) -> Words:
    """Return the four words of each counter under a key of two words.

    Words are int64 from 0 to 2^32 - 1, as torch multiplies no unsigned numbers; those of the
    counter broadcast against each other.
    """
    one, two, three, four = counter
    first, second = (word & LOW for word in key)
    for _ in range(ROUNDS):
        high_one, low_one = _multiplied(MULTIPLIERS[0], one)
        high_three, low_three = _multiplied(MULTIPLIERS[1], three)
        one, two, three, four = (
            high_three ^ two ^ first,
            low_three,
            high_one ^ four ^ second,
            low_one,
        )
        first, second = (first + KEY_STEPS[0]) & LOW, (second + KEY_STEPS[1]) & LOW
    return one, two, three, four


def _multiplied(constant: int, words: Tensor) -> tuple[Tensor, Tensor]:
    """The high and the low word of products, by halves of the words, so that none overflows."""
    low, high = constant * (words & 0xFFFF), constant * (words >> 16)
    return (high + (low >> 16)) >> 16, (low + ((high & 0xFFFF) << 16)) & LOW
