"""All that an engine has learned: weights, moments, average and buffers, by their names.

A parameter's numbers are cut up as ZeRO cuts them, and each rank gives and takes its own; what the
numbers are called and where they stand in the whole does not depend on stage or ranks. Weights are
those that the optimizer moves, in fp32.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from taming_dist.engine.average import WeightAverage
from taming_dist.engine.layouts import Layout, Part
from taming_dist.engine.pieces import Piece, Pieces
from taming_dist.errors import UserError
from taming_dist.models.joined import Stored, stored_parameters

WEIGHTS, AVERAGE, BUFFERS = "weights", "average", "buffers"
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class EngineState:
    """A rank's view of the state of an engine. Frozen parameters have weights alone, so that a run
    may free them, or freeze others, when it is resumed."""

    module: nn.Module
    layout: Layout
    average: WeightAverage | None

    def pieces(self, rank: int, ranks: int) -> Iterator[Piece]:
        """Yield what this rank has of the parameters; its share where every rank has everything."""
        for stored in stored_parameters(self.module):
            at, shares = (0, 1) if self._is_cut(stored.parameter) else (rank, ranks)
            for kind in (WEIGHTS, *MOMENTS, AVERAGE):
                for part, first in self._parts(kind, stored):
                    start, stop = (part.numel() * edge // shares for edge in (at, at + 1))
                    if stop > start:
                        yield Piece(f"{kind}/{stored.name}", first + start, part[start:stop])

    def whole(self) -> Iterator[tuple[str, Tensor]]:
        """Yield what every rank has whole, and therefore the same: buffers at any stage, weights
        but for those that ZeRO 3 cuts up, at ZeRO 0 moments and average, too."""
        for name, parameter in self.module.named_parameters():
            # whole for the while only, others may just be on their way
            if getattr(parameter, "ds_persist", True):
                yield f"{WEIGHTS}/{name}", parameter.data
        if not self.layout.cuts_optimizer:
            for piece in self.pieces(0, 1):
                if not piece.name.startswith(f"{WEIGHTS}/"):
                    yield piece.name, piece.values
        for piece in self.buffers():
            yield piece.name, piece.values

    def buffers(self) -> Iterator[Piece]:
        """Yield the buffers, whole: all ranks have the same."""
        for name, buffer in self._buffers():
            yield Piece(f"{BUFFERS}/{name}", 0, buffer.reshape(-1))

    @torch.no_grad()
    def fill(self, pieces: Pieces, steps: dict[str, int]) -> None:
        """Take this rank's numbers from what all ranks of some run have written; `steps`: what
        `steps` gave there. Forward gets the weights by `layout.publish`.

        Raises:
            UserError: they are of another network, or there is no average.
        """
        if self.average is not None and not self._has_average(pieces):
            raise UserError(
                f"{pieces.folder} has no average of the weights: that run kept none; set "
                f"optim.ema_half_life=0"
            )
        everything = list(stored_parameters(self.module))
        names = {stored.parameter: stored.name for stored in everything}
        self.layout.begin_state(lambda parameter: f"{MOMENTS[0]}/{names[parameter]}" in pieces)
        for stored in everything:
            name = stored.name
            for kind in (WEIGHTS, *MOMENTS, AVERAGE):
                for part, first in self._parts(kind, stored):
                    there = f"{kind}/{name}" in pieces
                    if kind in MOMENTS and not there:
                        continue  # it had no gradient yet
                    frozen = kind == AVERAGE and not there  # until now
                    pieces.fill(f"{WEIGHTS if frozen else kind}/{name}", first, part)
        for stored in self._trained():
            state = self.layout.state(stored.parameter)
            if state:
                state["step"].clamp_(min=steps.get(stored.name, 0))
        for name, buffer in self._buffers():
            values = torch.empty(buffer.numel(), dtype=buffer.dtype)
            pieces.fill(f"{BUFFERS}/{name}", 0, values)
            buffer.copy_(values.view(buffer.shape))

    def steps(self) -> dict[str, int]:
        """How often the optimizer has moved those parameters that this rank has a part of."""
        found = {}
        for stored in self._trained():
            step = self.layout.state(stored.parameter).get("step")
            if step is not None:
                found[stored.name] = step
        return {name: int(step) for name, step in zip(found, _read(found.values()), strict=True)}

    def _parts(self, kind: str, stored: Stored) -> Iterator[Part]:
        """This rank's parts of one kind of a stored tensor's numbers, without padding."""
        parameter: Any = stored.parameter
        if kind == AVERAGE and self.average is None:
            return
        if parameter.requires_grad:
            found = self.layout.optimizer_parts(parameter, kind if kind in MOMENTS else None)
        else:
            found = iter([self.layout.frozen(parameter)] if kind == WEIGHTS else [])
        share = getattr(parameter, "ds_numel", parameter.numel()) // stored.parts
        begin, end = stored.place * share, (stored.place + 1) * share
        for part, first in found:
            start, stop = max(first, begin), min(first + part.numel(), end)
            if stop > start:
                values = part[start - first : stop - first]
                if kind == AVERAGE and self.average is not None:
                    values = self.average.beside(values, self.layout.masters())
                yield values, start - begin

    def _is_cut(self, parameter: Any) -> bool:
        """Whether each rank has its own part of what there is of a parameter."""
        layout = self.layout
        return layout.cuts_optimizer if parameter.requires_grad else layout.cuts_weights

    def _trained(self) -> Iterator[Stored]:
        for stored in stored_parameters(self.module):
            if stored.parameter.requires_grad:
                yield stored

    def _buffers(self) -> Iterator[tuple[str, Tensor]]:
        """Those that a state_dict has."""
        for prefix, module in self.module.named_modules():
            for name, buffer in module._buffers.items():
                if buffer is not None and name not in module._non_persistent_buffers_set:
                    yield f"{prefix}.{name}".lstrip("."), buffer

    def _has_average(self, pieces: Pieces) -> bool:
        return any(f"{AVERAGE}/{stored.name}" in pieces for stored in self._trained())


def _read(values: Any) -> list[float]:
    """Scalars, read from the device at once."""
    listed = list(values)
    return torch.stack(listed).tolist() if listed else []
