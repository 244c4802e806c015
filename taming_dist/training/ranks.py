"""What the ranks of a run are like beside each other: memory, waits for data, losses.

The numbers of all ranks come with the means of a log point, in the same collective.
"""

import resource
from collections.abc import Mapping

import torch
from torch import Tensor

from taming_dist.training.metrics import LOSS, Metrics

MEMORY, RETRIES, WAIT = "memory", "retries", "wait"
GIB = 2**30
KIB = 2**10


class Memory:
    """The memory of this rank: of its GPU, or of its process where it has none."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._retries = self._all_retries()

    def take(self) -> dict[str, float]:
        """The most that was in use, in GiB: on a GPU, what tensors took since the last call; on the
        CPU, what the process has ever had. On a GPU also how often since the last call the
        allocator had to give all free memory back and ask again. Waits for nothing."""
        if self._device.type != "cuda":
            return {MEMORY: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB / GIB}
        before, self._retries = self._retries, self._all_retries()
        found = {
            MEMORY: torch.cuda.max_memory_allocated(self._device) / GIB,
            RETRIES: float(self._retries - before),
        }
        torch.cuda.reset_peak_memory_stats(self._device)
        return found

    def _all_retries(self) -> int:
        if self._device.type != "cuda":
            return 0
        return torch.cuda.memory_stats(self._device).get("num_alloc_retries", 0)


def beside_each_other(ranks: Mapping[str, Tensor]) -> Metrics:
    """What a log point says of the numbers of all ranks [R], by name: `ranks/...` tells of several
    which stands out, with the rank whose wait for data was the longest, for which all others have
    to wait in their step."""
    found: Metrics = {}
    if MEMORY in ranks:
        found["throughput/memory_peak_gib"] = ranks[MEMORY].max()
    if RETRIES in ranks:
        found["throughput/allocator_retries"] = ranks[RETRIES].sum()
    if WAIT in ranks and len(ranks[WAIT]) > 1:
        found["ranks/data_wait_max"] = ranks[WAIT].max()
        found["ranks/data_wait_longest"] = ranks[WAIT].argmax()
    if LOSS in ranks and len(ranks[LOSS]) > 1:
        found["ranks/loss_max"] = ranks[LOSS].max()
    return found
