"""Linear layers of one width that are computed as one, and stored as the ones that they are.

One product instead of several, one read of x, one gradient of it, and fewer parameters for the
engine to follow. State dicts, exports and checkpoints have the tensors of each layer by its name,
so that those of the original implementation, and of versions that computed them apart, fit.
"""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn

FEW = 32  # positions up to which CPUs are faster at several products (docs/speed.md)


class JoinedLinear(nn.Linear):
    """Layers from `width` to `width`, whose weights lie in one below the other, in their order.

    `names`: those of the layers beside this one, by which their tensors are stored.
    """

    def __init__(self, width: int, names: tuple[str, ...]) -> None:
        super().__init__(width, len(names) * width)
        self.names = names

    def forward(  # type: ignore[override]
        self, *reads: Float[Tensor, "... c"]
    ) -> tuple[Float[Tensor, "... c"], ...]:
        """Return what each layer makes of what it reads, in one product where that is the same and
        faster."""
        count, first = len(self.names), reads[0]
        few = first.device.type == "cpu" and first.shape[:-1].numel() <= FEW
        if not few and all(read is first for read in reads):
            return super().forward(first).unflatten(-1, (count, -1)).unbind(-2)
        return tuple(map(F.linear, reads, self.weight.chunk(count), self.bias.chunk(count)))


class Stored(NamedTuple):
    """A tensor as it is stored: its name; the parameter that it is the `place`-th of `parts` equal
    parts of, along the first axis, and the name of that."""

    name: str
    parameter: nn.Parameter
    place: int
    parts: int
    source: str

    def of(self, whole: Shaped[Tensor, "*size"]) -> Shaped[Tensor, "*part"]:
        """Return the part of a tensor of the parameter's shape."""
        return whole if self.parts == 1 else whole.chunk(self.parts)[self.place]


def stored_parameters(network: nn.Module) -> Iterator[Stored]:
    """Yield the parameters of a network as they are stored, in its order."""
    joined = {
        f"{name}.": module.names
        for name, module in network.named_modules()
        if isinstance(module, JoinedLinear)
    }
    for source, parameter in network.named_parameters():
        place, _, kind = source.rpartition(".")
        names = joined.get(f"{place}.")
        if names is None:
            yield Stored(source, parameter, 0, 1, source)
            continue
        beside = place[: place.rfind(".") + 1]
        for index, name in enumerate(names):
            yield Stored(f"{beside}{name}.{kind}", parameter, index, len(names), source)


def as_stored(
    network: nn.Module, state: Mapping[str, Shaped[Tensor, "..."]]
) -> dict[str, Shaped[Tensor, "..."]]:
    """Return a state of a network by the names of its parameters and buffers as it is stored; what
    is cut has memory of its own, as safetensors asks for."""
    parts: dict[str, list[Stored]] = {}
    for part in stored_parameters(network):
        parts.setdefault(part.source, []).append(part)
    found = {}
    for name, tensor in state.items():
        stored = parts.get(name)
        if stored is None:
            found[name] = tensor
        else:
            found |= {p.name: p.of(tensor).clone() if p.parts > 1 else tensor for p in stored}
    return found


def as_computed(
    network: nn.Module, state: Mapping[str, Shaped[Tensor, "..."]]
) -> dict[str, Shaped[Tensor, "..."]]:
    """Return a stored state by the names that a network's parameters have; what is there of no
    parameter, or not whole, stays as it is."""
    parts: dict[str, list[str]] = {}
    for part in stored_parameters(network):
        parts.setdefault(part.source, []).append(part.name)
    found = dict(state)
    for source, names in parts.items():
        if len(names) > 1 and all(name in found for name in names):
            found[source] = torch.cat([found.pop(name) for name in names])
    return found
