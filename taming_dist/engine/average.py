"""Exponential moving average of an engine's weights, cut up over ranks as ZeRO cuts its optimizer.

Source: arXiv 2312.02696, section 3 (averages measured in training time); here the time is images.
"""

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

CHUNK = 2**24  # elements
WARM_UP_STEPS = 10  # the average of a young run forgets faster: its early weights are noise


class WeightAverage:
    """The average of this rank's fp32 numbers: after `half_life` images a weight counts half.

    `shards` are what `Engine.masters` gives, all weights at ZeRO 0 and a part of them above.
    """

    def __init__(self, shards: list[Tensor], half_life: float, images_per_step: int) -> None:
        self.shards = [shard.detach().clone() for shard in shards]
        self.steps = torch.zeros((), dtype=torch.int64, device=shards[0].device)
        self._decay = 0.5 ** (images_per_step / half_life)

    @torch.no_grad()
    def update(self, shards: list[Tensor], moved: Tensor) -> None:
        """Take in the weights after an optimizer step; `moved`, a flag on the device: it was not
        skipped, which else leaves the average as it is."""
        self.steps += moved
        steps = self.steps.double()
        decay = (steps / (steps + WARM_UP_STEPS)).clamp(max=self._decay)
        share = ((1 - decay) * moved).float()
        ways = torch._foreach_sub([shard.detach() for shard in shards], self.shards)
        torch._foreach_mul_(ways, share)
        torch._foreach_add_(self.shards, ways)

    def beside(self, part: Tensor, shards: list[Tensor]) -> Tensor:
        """The average of a part [n] of the weights, which is a view of one of them: a view, too."""
        for ours, theirs in zip(self.shards, shards, strict=True):
            first = part.storage_offset() - theirs.storage_offset()
            alike = part.untyped_storage().data_ptr() == theirs.untyped_storage().data_ptr()
            if alike and 0 <= first < theirs.numel():
                return ours.view(-1)[first : first + part.numel()]
        raise AssertionError("no weight of this average")

    @torch.no_grad()
    def exchange(self, shards: list[Tensor]) -> None:
        """The average takes the values of the weights and they take its own, in place; what it
        needs beside is one chunk of them."""
        for ours, theirs in zip(self.shards, shards, strict=True):
            chunks = (part.view(-1).split(CHUNK) for part in (ours, theirs.detach()))
            for one, other in zip(*chunks, strict=True):
                kept = one.clone()
                one.copy_(other)
                other.copy_(kept)

    def load(self, file: Path) -> None:
        """Read this rank's part of a checkpoint of before."""
        tensors = load_file(file, device=str(self.shards[0].device))
        self.steps.copy_(tensors.pop("steps"))
        for shard, value in zip(self.shards, tensors.values(), strict=True):
            shard.copy_(value)
