"""Settings of the C library's allocator, useful wherever large arrays come and go, and of Python's
collector of garbage."""

import ctypes
import gc

TRIM_THRESHOLD, MMAP_THRESHOLD, ARENA_MAX = -1, -3, -8  # malloc.h


def keep_freed_memory(one_heap: bool = False) -> None:
    """Have glibc keep the memory of large arrays for later ones: faster, see docs/speed.md.

    By default it returns every large block to the system and pays for new pages each time.
    `one_heap`: memory freed by one thread serves the others; by default each has its own heap.
    Does nothing if the C library has no mallopt.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(MMAP_THRESHOLD, 1 << 30)
        mallopt(TRIM_THRESHOLD, (1 << 31) - 1)
        if one_heap:
            mallopt(ARENA_MAX, 1)


def start_without_collecting() -> None:
    """Have Python look for no garbage while it imports, whose objects stay: a seventh of the time
    (docs/speed.md). `collect_from_now_on` ends it."""
    gc.disable()


def collect_from_now_on() -> None:
    """Have Python look for garbage among what comes, not among what there is once this is done."""
    gc.collect()
    gc.freeze()
    gc.enable()
