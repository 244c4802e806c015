"""What an evaluation says while it runs."""

import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from taming_dist.engine.world import World

PERIOD_S = 10.0

AnyBatch = TypeVar("AnyBatch")


def with_progress(
    batches: Iterator[AnyBatch],
    total: int | None,
    world: World,
    count: Callable[[Any], int] = len,
    what: str = "",
) -> Iterator[AnyBatch]:
    """Pass this rank's batches on, and on the first rank report now and then on stderr how many
    images all ranks have done, if they are alike, and how fast. `total`: of how many (None: that is
    not known); `count` gives the images of a batch; `what` they are is said before."""
    start = said = time.perf_counter()
    done = 0
    for batch in batches:
        yield batch
        done += count(batch) * world.world_size
        now = time.perf_counter()
        if world.is_first and now - said >= PERIOD_S:
            said = now
            of = "" if total is None else f"/{total}"
            shown = done if total is None else min(done, total)
            rate = f"{shown / (now - start):.1f} images/s"
            print(f"{what}{shown}{of} images, {rate}", file=sys.stderr, flush=True)
