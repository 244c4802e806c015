"""An alarm for a codebook that collapses: most of its codes are no longer used, and training seldom
brings them back (arXiv 2110.04627, section 3.2). It tells, and ends nothing.
"""

from collections.abc import Mapping

PERPLEXITY, USAGE = "train/codebook_perplexity", "train/codebook_usage"
FALL = 0.1  # of the highest perplexity so far
LEAST_USED = 0.02  # of all codes, once training has got going
GOING = 1000  # steps
IN_A_ROW = 2  # log points: one that a save cuts short has seen few images, and so few codes


class CollapseAlarm:
    """Looks at the log points of a start; tells once for each fall."""

    def __init__(self) -> None:
        self._best = 0.0
        self._low = 0

    def look(self, step: int, record: Mapping[str, float]) -> str | None:
        """What to say of the present log point, or None; `record` may be of a model without
        codes."""
        perplexity, usage = record.get(PERPLEXITY), record.get(USAGE)
        if perplexity is None or usage is None or not perplexity > 0:
            return None
        self._best = max(self._best, perplexity)
        fallen = perplexity < FALL * self._best
        unused = step >= GOING and usage < LEAST_USED
        self._low = self._low + 1 if fallen or unused else 0
        if self._low != IN_A_ROW:
            return None
        return (
            f"step {step}: the codebook collapses: {usage:.1%} of its codes are used, perplexity "
            f"{perplexity:.3g} (highest {self._best:.3g}); see docs/quantizers.md for quantizers "
            f"that bring codes back"
        )
