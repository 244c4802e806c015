"""Whether what every rank holds whole is the same on all of them, to the bit.

Ranks add the same gradients to the same weights. A faulty memory, link or kernel sets them apart
without a sign; then each rank trains a network of its own.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes


def digests(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, int]:
    """The sum of each tensor's bits, taken as integers: a bit that is flipped changes it. The host
    waits once for each device, and nothing of the tensors' size is made there."""
    names: dict[torch.device, list[str]] = {}
    sums: dict[torch.device, list[Tensor]] = {}
    for name, values in tensors:
        bits = values.detach().view(INTEGERS[values.itemsize])
        names.setdefault(values.device, []).append(name)
        sums.setdefault(values.device, []).append(bits.sum(dtype=torch.int64))
    found: dict[str, int] = {}
    for device, each in sums.items():
        found |= zip(names[device], torch.stack(each).tolist(), strict=True)
    return found


def difference(told: Sequence[Mapping[str, int]]) -> str | None:
    """The first tensor that is not the same on all ranks, in words, from the digests of each rank;
    None if there is none."""
    for name in told[0]:
        held = [digests.get(name) for digests in told]
        ((usual, count), *others) = Counter(held).most_common()
        if not others:
            continue
        if 2 * count > len(held):
            apart = [str(rank) for rank, digest in enumerate(held) if digest != usual]
            ranks = f"rank {apart[0]}" if len(apart) == 1 else f"ranks {', '.join(apart)}"
            return f"{name} on {ranks} is not what it is on the others"
        other = next(rank for rank, digest in enumerate(held) if digest != held[0])
        return f"{name} is not the same on ranks 0 and {other}"
    return None
