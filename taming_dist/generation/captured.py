"""One token is one launch: the step of a token, recorded once in a CUDA graph and then replayed.

A token of a small batch is hundreds of small kernels, and launching them takes longer than running
them. Everything that changes from token to token is a tensor on the device (`StaticCache`,
`Draft`), so that the recorded step is the same for each.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from taming_dist.models.prior.blocks import KVCache, StaticCache
from taming_dist.models.prior.schemes import Draft, Look, Write, unwatched

WARM_UPS = 3  # as the libraries under the kernels, and the compiler, ask for


class Shape(NamedTuple):
    """What a recorded step is for."""

    images: int
    tokens: int
    keys: tuple[int, ...]
    dtype: torch.dtype
    prefix: int


@dataclass
class Recorded:
    """A step, and the tensors that it reads and writes."""

    draft: Draft
    cache: StaticCache
    step: Callable[[], None]

    def load(self, draft: Draft, cache: KVCache) -> None:
        """Make it continue other images."""
        for mine, other in zip(self.draft, draft, strict=True):
            mine.copy_(other)
        self.cache.load(cache)


class Captured:
    """Writes tokens (`schemes.Repeat`) by one recorded step for each shape of batch, and keeps it.

    All that it is called with is of one network and one way to choose. On a GPU the step is
    recorded in a CUDA graph; elsewhere it runs as it is. `compiled`: torch.compile has turned it
    into few kernels before.
    """

    def __init__(self, compiled: bool = False) -> None:
        self.compiled = compiled
        self._kept: dict[Shape, Recorded] = {}

    def batch(self, images: int) -> int:
        """Return how large a batch of so many images should be: as one that is recorded, if it may
        be filled up to that."""
        sizes = {shape.images for shape in self._kept}
        return min((size for size in sizes if size >= images), default=images)

    def __call__(
        self, write: Write, draft: Draft, cache: KVCache, times: int, look: Look = unwatched
    ) -> Tensor:
        """Write so many tokens of each image, and return all of them [b, n]."""
        while cache.again is not None and times:  # what is cached still changes
            write(draft, cache)
            look(draft.so_far)
            times -= 1
        if not times:
            return draft.tokens
        keys, (images, tokens) = cache.keys[0], draft.tokens.shape
        shape = Shape(images, tokens, keys.shape, keys.dtype, cache.prefix)
        kept = self._kept.get(shape)
        if kept is None:
            kept = self._kept[shape] = self._recorded(write, draft, StaticCache(cache))
        else:
            kept.load(draft, cache)
        for _ in range(times):
            kept.step()
            look(kept.draft.so_far)
        return kept.draft.tokens.clone()

    def _recorded(self, write: Write, draft: Draft, cache: StaticCache) -> Recorded:
        if self.compiled:
            write = torch.compile(write, fullgraph=True, dynamic=False)
        step: Callable[[], None] = partial(write, draft, cache)
        if draft.tokens.device.type == "cuda":
            step = _graph(step, [draft.tokens, draft.at, cache.position])
        return Recorded(draft, cache, step)


def _graph(step: Callable[[], None], changed: list[Tensor]) -> Callable[[], None]:
    """The step as a CUDA graph. Recording runs nothing; what warming up has `changed` is put back,
    and what it has written into the cache is written over."""
    before = [tensor.clone() for tensor in changed]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UPS):
            step()
            for tensor, was in zip(changed, before, strict=True):
                tensor.copy_(was)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # other threads may use the GPU meanwhile: pictures are copied from it
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        step()
    return graph.replay
