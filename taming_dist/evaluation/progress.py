"""What an evaluation says while it runs."""

import sys
import time
from collections.abc import Iterator
from typing import TypeVar

from taming_dist.data.codes import CodeBatch
from taming_dist.data.reader import Batch
from taming_dist.engine.world import World

PERIOD_S = 10.0

AnyBatch = TypeVar("AnyBatch", Batch, CodeBatch)


def with_progress(batches: Iterator[AnyBatch], total: int, world: World) -> Iterator[AnyBatch]:
    """Pass this rank's batches on, and on the first rank report now and then on stderr how many of
    the `total` images all ranks have done, if they are alike, and how fast."""
    start = said = time.perf_counter()
    done = 0
    for batch in batches:
        yield batch
        done = min(total, done + len(batch) * world.world_size)
        now = time.perf_counter()
        if world.is_first and now - said >= PERIOD_S:
            said = now
            rate = done / (now - start)
            print(f"{done}/{total} images, {rate:.1f} images/s", file=sys.stderr, flush=True)
