"""How the C library gives out memory; needed wherever large arrays come and go."""

import ctypes

TRIM_THRESHOLD, MMAP_THRESHOLD, ARENA_MAX = -1, -3, -8  # malloc.h


def keep_freed_memory(one_heap: bool = False) -> None:
    """Have glibc keep the memory of big arrays for the next ones: faster, see docs/results.md.

    By default it gives every large block back to the system and pays for new pages each time.
    `one_heap`: what one thread frees serves the others; by default threads have heaps of their own.
    Where the C library has no mallopt nothing is changed.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(MMAP_THRESHOLD, 1 << 30)
        mallopt(TRIM_THRESHOLD, (1 << 31) - 1)
        if one_heap:
            mallopt(ARENA_MAX, 1)
