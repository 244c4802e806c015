"""What ranks send each other in a step: counted, as this package has it from DeepSpeed, in theory.

Psi is the number of parameters, R that of ranks; numbers are fp32. A message is a collective with
the whole that it makes or adds up: of n bytes each rank sends 2 n (R-1)/R of a sum by a ring, and
n (R-1)/R of all others.
"""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from taming_dist.engine.settings import BUCKET, EngineConfig

FP32 = 4
SUM, GATHER, SCATTER = "all-reduce", "all-gather", "reduce-scatter"
KINDS = {
    "allreduce": SUM,
    "allgather": GATHER,
    "reduce_scatter": SCATTER,
    "broadcast": "broadcast",
    "reduce": "reduce",
}  # in this order: names of torch's operations begin so
Messages = Mapping[str, float]  # bytes by kind


class Traffic(TorchDispatchMode):
    """Counts the messages of this process while it is entered: `calls` and `bytes` by kind."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func._schema.name
        if name.startswith("c10d::") and not name.endswith("barrier"):
            kind = kind_of(name.removeprefix("c10d::").strip("_"))
            self.calls[kind] += 1
            self.bytes[kind] += max(size_of(argument) for argument in args)
        return func(*args, **(kwargs or {}))


def kind_of(name: str) -> str:
    """What a collective of torch's backends is called here."""
    return next((kind for start, kind in KINDS.items() if name.startswith(start)), name)


def size_of(argument: Any) -> int:
    """Bytes of the tensors in an argument: of the whole where a collective has whole and part."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors_in(argument))


def tensors_in(argument: Any) -> Iterator[Tensor]:
    if isinstance(argument, Tensor):
        yield argument
    elif isinstance(argument, list | tuple):
        for each in argument:
            yield from tensors_in(each)


def sent(messages: Messages, ranks: int) -> float:
    """Bytes that each rank sends."""
    each = {kind: (2 if kind == SUM else 1) * size for kind, size in messages.items()}
    return sum(each.values()) * (ranks - 1) / ranks


def theory(parameters: float, zero: int) -> Messages:
    """The least that a step of one micro-batch takes (arXiv 1910.02054, section 7): gradients are
    added up, by stages that cut them up only as far as a rank needs them, and weights gathered
    after the step, at stage 3 before the forward and before the backward pass."""
    whole = FP32 * parameters
    if zero == 0:
        return {SUM: whole}
    return {SCATTER: whole, GATHER: whole * (2 if zero == 3 else 1)}


def expected(
    sizes: Iterable[int], engine: EngineConfig, ranks: int, accumulation: int = 1, walks: int = 1
) -> Messages:
    """The messages of an optimizer step as DeepSpeed is set here, but for a norm of 4 bytes.

    `sizes`: elements of each parameter. Stages 1 and 2 add gradients up on all ranks, and stage 2,
    as 3, those of each micro-batch. Stage 3 has a network of fewer elements than its bucket whole
    until the backward pass is over and gathers it once, a larger one for either pass; `walks`: how
    often that is in a micro-batch. Padding to equal parts is left out.
    """
    everything = list(sizes)
    whole, micro = float(FP32 * sum(everything)), accumulation if engine.zero >= 2 else 1
    if ranks == 1:
        return {}
    if engine.zero == 0:
        return {SUM: whole}
    if engine.zero < 3:
        return {SUM: whole * micro, GATHER: whole}
    passes = 1 if sum(everything) <= BUCKET else 2
    gathered = FP32 * sum(size for size in everything if size >= engine.persist_below)
    small = whole - gathered  # whole everywhere: gathered after the step only
    return {SCATTER: whole * micro, GATHER: gathered * passes * walks * micro + small}


def summed(parts: Sequence[Messages]) -> Messages:
    """The messages of several networks."""
    found: Counter[str] = Counter()
    for part in parts:
        found.update(part)
    return found
