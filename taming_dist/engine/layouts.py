"""Where each ZeRO stage keeps the weights: all private names of DeepSpeed's optimizers.

A weight has a fp32 copy that the optimizer moves, its master, and moments beside it; at ZeRO 0 and
3 the master is what forward uses, too. Stages cut up what they cut up flat.
"""

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

Part = tuple[Tensor, int]  # flat numbers of a parameter, and the index of the first in the whole


class Layout(Protocol):
    """What an engine asks of a stage; `publish` is a collective."""

    def __init__(self, engine: Any) -> None: ...

    def masters(self) -> list[Tensor]:
        """The fp32 numbers that this rank's optimizer moves."""
        ...

    def publish(self) -> None:
        """Bring changed masters to where forward takes the weights from."""
        ...

    def weights(self, parameter: Any) -> Iterator[Part]:
        """This rank's parts of a parameter beside its master."""
        ...

    def optimizer_parts(self, parameter: Any, name: str | None) -> Iterator[Part]:
        """This rank's part of the master (None), or of a part of the optimizer's state."""
        ...


class Whole:
    """ZeRO 0: every rank has everything, in the parameters themselves."""

    def __init__(self, engine: Any) -> None:
        self._module, self._optimizer = engine.module, engine.optimizer

    def masters(self) -> list[Tensor]:
        return [parameter.data for parameter in self._module.parameters()]

    def publish(self) -> None:
        pass

    def weights(self, parameter: Any) -> Iterator[Part]:
        yield from ()

    def optimizer_parts(self, parameter: Any, name: str | None) -> Iterator[Part]:
        held = self._optimizer.state.get(parameter, {}).get(name) if name else parameter.data
        if held is not None:
            yield held.view(-1), 0


class CutOptimizer:
    """ZeRO 1 and 2: parameters whole on every rank, masters and moments cut up."""

    def __init__(self, engine: Any) -> None:
        self._optimizer = engine.optimizer

    def masters(self) -> list[Tensor]:
        return [shard.data for shard in self._optimizer.single_partition_of_fp32_groups]

    def publish(self) -> None:
        self._optimizer.update_lp_params()

    def weights(self, parameter: Any) -> Iterator[Part]:
        yield parameter.data.view(-1), 0

    def optimizer_parts(self, parameter: Any, name: str | None) -> Iterator[Part]:
        mapping = parameter._hp_mapping
        if mapping is not None:  # this rank has a part of it
            yield mapping.get_hp_fragment(name).view(-1), mapping.lp_fragment_address.start


class CutWeights:
    """ZeRO 3: parameters cut up too, whole only while they are used (small ones: always)."""

    def __init__(self, engine: Any) -> None:
        self._optimizer, self._rank = engine.optimizer, engine.global_rank

    def masters(self) -> list[Tensor]:
        return [shard.data for shard in self._optimizer.fp32_partitioned_groups_flat]

    def publish(self) -> None:
        optimizer = self._optimizer
        optimizer.checkpoint_event_prologue()  # lets go of all that is whole
        for index in range(len(optimizer.fp32_partitioned_groups_flat)):
            optimizer._reassign_or_swap_out_partitioned_parameters(index)
        optimizer.checkpoint_event_epilogue()  # gathers the small ones

    def weights(self, parameter: Any) -> Iterator[Part]:
        if parameter.data.numel():  # empty while it is not whole
            yield parameter.data.view(-1), 0
        share = parameter.ds_tensor.data.view(-1)
        yield share, share.numel() * self._rank

    def optimizer_parts(self, parameter: Any, name: str | None) -> Iterator[Part]:
        part, _ = self._optimizer._get_fp32_opt_state_partition(parameter, True, name)
        yield part, part.numel() * self._rank


LAYOUTS: dict[int, type[Layout]] = {0: Whole, 1: CutOptimizer, 2: CutOptimizer, 3: CutWeights}


def write_rows(part: Tensor, first: int, rows: Tensor, values: Tensor) -> None:
    """Write rows [m] of a tensor, values [m,...], into a flat part of it, in place.

    The part starts at element `first` of the whole; what lies outside it is left out.
    """
    rows, values = rows.to(part.device), values.to(part)
    width = values[0].numel()
    at = (rows[:, None] * width + torch.arange(width, device=part.device)).flatten() - first
    inside = (at >= 0) & (at < part.numel())
    part[at[inside]] = values.flatten()[inside]
