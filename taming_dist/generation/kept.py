"""What windows that are needed again have read: the rows of one cache.

Legend: b rows of a step, t positions of it, s positions of the cache, d width of a head.
"""

from collections.abc import Hashable, Sequence

import numpy as np
import torch
from torch import Tensor

from taming_dist.copies import to_device
from taming_dist.models.prior.blocks import KVCache


class Kept:
    """Caches of windows by their names, as many as fit into `limit` bytes; the memory is taken when
    the first is kept, for at most `most` windows."""

    def __init__(self, limit: float, most: int) -> None:
        self._limit, self._most = limit, most
        self._whole: KVCache | None = None
        self._free: list[int] = []
        self._slots: dict[Hashable, int] = {}
        self._lengths: dict[Hashable, int] = {}
        self._halves = 1  # rows of a window: two with guidance

    def length(self, name: Hashable) -> int:
        """How many positions of a window are kept, 0: none."""
        return self._lengths.get(name, 0)

    def keep(self, names: Sequence[Hashable], wanted: Sequence[bool], cache: KVCache) -> None:
        """Keep the cache of those of its windows that are wanted, as long as there is room."""
        if cache.again is not None or not any(wanted):
            return  # a cache that changes with each position cannot be extended
        if self._whole is None:
            self._take_memory(cache, len(names))
        chosen = [k for k, want in enumerate(wanted) if want][: len(self._free)]
        if not chosen:
            return
        for k in chosen:
            self._slots[names[k]] = self._free.pop()
            self._lengths[names[k]] = cache.length
        into = self._rows([names[k] for k in chosen])
        halves = range(self._halves)
        rows = numbers([k + half * len(names) for half in halves for k in chosen], into.device)
        whole = self._whole
        assert whole is not None
        seen = slice(cache.length)
        for kept, read in ((whole.keys, cache.keys), (whole.values, cache.values)):
            for mine, other in zip(kept, read, strict=True):
                mine[into, :, seen] = other[:, :, seen].index_select(0, rows)
        if whole.around.signal is not None and cache.around.signal is not None:
            whole.around.signal[into] = cache.around.signal[rows]

    def extended(self, names: Sequence[Hashable], count: int) -> "Rows":
        """Return the cache of kept windows for a step of `count` positions, which they then have
        read."""
        assert self._whole is not None
        lengths = [self._lengths[name] for name in names]
        for name in names:
            self._lengths[name] += count
        return Rows(self._whole, self._rows(names), lengths, count)

    def drop(self, name: Hashable) -> None:
        """Give up what is kept of a window, if anything is."""
        if name in self._slots:
            self._free.append(self._slots.pop(name))
            del self._lengths[name]

    def _rows(self, names: Sequence[Hashable]) -> Tensor:
        """The rows of windows, on the device: the second half of each lies behind all the first."""
        assert self._whole is not None
        first = self._whole.keys[0]
        slots = len(first) // self._halves
        rows = [self._slots[name] + half * slots for half in range(self._halves) for name in names]
        return numbers(rows, first.device)

    def _take_memory(self, cache: KVCache, windows: int) -> None:
        first = cache.keys[0]
        self._halves = len(first) // windows
        one = 2 * len(cache.keys) * first[: self._halves].nbytes
        slots = int(min(self._limit, self._most * one) // one)  # a limit may be infinite
        shape = (slots * self._halves, *first.shape[1:])
        # zeros: what is masked counts nothing, but times nothing of it may be infinite
        keys, values = ([first.new_zeros(shape) for _ in cache.keys] for _ in range(2))
        around, signal = cache.around, cache.around.signal
        if signal is not None:
            around = around._replace(signal=signal.new_zeros(slots * self._halves, signal.shape[1]))
        self._whole = KVCache(keys, values, cache.learned, around, cache.prefix)
        self._free = list(range(slots))


def numbers(values: Sequence[int] | np.ndarray, device: torch.device) -> Tensor:
    """Return whole numbers as int64 on a device, which is not waited for."""
    return to_device(torch.from_numpy(np.asarray(values)), device)


class Rows(KVCache):
    """Some rows of a cache for one step of `count` positions. `lengths` has how many positions each
    has before it; if there are more rows, they are the second halves of the same windows."""

    def __init__(self, whole: KVCache, rows: Tensor, lengths: Sequence[int], count: int) -> None:
        around = whole.around
        if around.signal is not None:
            around = around._replace(signal=around.signal[rows])
        super().__init__(whole.keys, whole.values, whole.learned, around, whole.prefix)
        self.rows, self.length, self._windows = rows, max(lengths), len(lengths)
        self.at: Tensor | None = None  # [rows, count]; None: all have the same length
        if min(lengths) < self.length:
            starts = numbers(lengths, rows.device).repeat(len(rows) // len(lengths))
            self.at = starts[:, None] + torch.arange(count, device=rows.device)

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        end = self.length + key.shape[2]
        found = []
        for mine, new in ((self.keys[layer], key), (self.values[layer], value)):
            new = new.to(mine.dtype)
            if self.at is None:
                mine[self.rows, :, self.length : end] = new
            else:
                mine[self.rows[:, None], :, self.at] = new.transpose(1, 2)
            found.append(mine[:, :, :end].index_select(0, self.rows))
        return found[0], found[1]

    def next(self, table: Tensor, count: int = 1) -> Tensor:
        return super().next(table, count) if self.at is None else table[self.at]

    def of_token(self, table: Tensor) -> Tensor:
        if self.at is None:
            return super().of_token(table)
        return table[self.at[: self._windows, -1] + 1 - self.prefix]

    def mask(self) -> Tensor | None:
        if self.at is None:
            return None
        end = self.length + self.at.shape[1]
        later = torch.arange(end, device=self.at.device) > self.at[:, None, :, None]
        return torch.zeros_like(later, dtype=self.keys[0].dtype).masked_fill(later, -torch.inf)
