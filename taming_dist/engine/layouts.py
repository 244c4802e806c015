"""Where each ZeRO stage keeps the weights: all private names of DeepSpeed's optimizers.

A weight has a fp32 copy that the optimizer moves, its master, and moments beside it; at ZeRO 0 and
3 the master is what forward uses, too. Stages cut up what they cut up flat.
"""

from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from typing import Any, Protocol

import torch
from torch import Tensor

Part = tuple[Tensor, int]  # flat numbers of a parameter, and the index of the first in the whole


class Layout(Protocol):
    """What an engine asks of a stage; `publish` is a collective."""

    cuts_weights: bool  # or all ranks have them whole
    cuts_optimizer: bool

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

    def frozen(self, parameter: Any) -> Part:
        """This rank's part of a parameter that no optimizer moves."""
        ...

    def optimizer_parts(self, parameter: Any, name: str | None) -> Iterator[Part]:
        """This rank's part of the master (None), or of a part of the optimizer's state, which
        there is none of before the first step."""
        ...

    def state(self, parameter: Any) -> dict[str, Any]:
        """The optimizer's state that a parameter's part of it lies in; empty before the first
        step, or where this rank has no part."""
        ...

    def begin_state(self, kept: Callable[[Any], bool]) -> None:
        """Give the optimizer an empty state, as before its first step; moments of zero for those
        parameters that are `kept`, or for all."""
        ...

    def gradients(self) -> list[Tensor]:
        """The gradient that this rank's optimizer is about to follow, averaged over ranks."""
        ...


class Whole:
    """ZeRO 0: every rank has everything, in the parameters themselves."""

    cuts_weights = cuts_optimizer = False

    def __init__(self, engine: Any) -> None:
        self._optimizer = engine.optimizer
        # once: a walk takes the host milliseconds
        self._parameters = [p for p in engine.module.parameters() if p.requires_grad]
        engine.zero_grad = self._drop_gradients
        if engine.world_size > 1:
            # It leaves the setting of the buckets' size aside.
            size = engine.zero_reduce_bucket_size()
            engine.allreduce_gradients = partial(engine.allreduce_gradients, bucket_size=size)
        else:  # where it would copy all gradients to and fro
            engine.allreduce_gradients = self._complete_gradients

    def _drop_gradients(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    def _complete_gradients(self) -> None:
        """Give those that had no part in the loss a gradient of zero, as sums over ranks have."""
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)

    def masters(self) -> list[Tensor]:
        return [parameter.data for parameter in self._parameters]

    def publish(self) -> None:
        pass

    def weights(self, parameter: Any) -> Iterator[Part]:
        yield from ()

    def frozen(self, parameter: Any) -> Part:
        return parameter.data.view(-1), 0

    def optimizer_parts(self, parameter: Any, name: str | None) -> Iterator[Part]:
        held = self.state(parameter).get(name) if name else parameter.data
        if held is not None:
            yield held.view(-1), 0

    def state(self, parameter: Any) -> dict[str, Any]:
        return self._optimizer.state.get(parameter, {})

    def begin_state(self, kept: Callable[[Any], bool]) -> None:
        self._optimizer.state.clear()
        for parameter in self._parameters:
            if kept(parameter):
                self._optimizer.state[parameter] = no_moments(parameter)

    def gradients(self) -> list[Tensor]:
        return [p.grad for p in self._parameters if p.grad is not None]


class CutOptimizer:
    """ZeRO 1 and 2: parameters whole on every rank, masters and moments cut up."""

    cuts_weights, cuts_optimizer = False, True

    def __init__(self, engine: Any) -> None:
        self._optimizer = engine.optimizer
        # DeepSpeed would have the host wait for the norm to see whether it is finite. That is the
        # engine's to decide, on the device; this one is finite, and on the host.
        self._optimizer.scaled_global_norm = lambda: 0.0

    def masters(self) -> list[Tensor]:
        return [shard.data for shard in self._optimizer.single_partition_of_fp32_groups]

    def publish(self) -> None:
        self._optimizer.update_lp_params()

    def weights(self, parameter: Any) -> Iterator[Part]:
        yield parameter.data.view(-1), 0

    def frozen(self, parameter: Any) -> Part:
        return parameter.data.view(-1), 0

    def optimizer_parts(self, parameter: Any, name: str | None) -> Iterator[Part]:
        mapping = parameter._hp_mapping
        if mapping is None:  # this rank has no part of it
            return
        # its own way to the state links the first group only
        held = self.state(parameter).get(name) if name else self._shard(mapping)
        if held is not None:
            there = mapping.hp_fragment_address
            part = held.data.view(-1)[there.start : there.start + there.numel]
            yield part, mapping.lp_fragment_address.start

    def state(self, parameter: Any) -> dict[str, Any]:
        mapping = parameter._hp_mapping
        if mapping is None:
            return {}
        return self._optimizer.optimizer.state.get(self._shard(mapping), {})

    def begin_state(self, kept: Callable[[Any], bool]) -> None:
        state = self._optimizer.optimizer.state
        state.clear()
        for shard in self._optimizer.single_partition_of_fp32_groups:
            state[shard] = no_moments(shard)

    def _shard(self, mapping: Any) -> Tensor:
        """This rank's part of a parameter's group."""
        return self._optimizer.single_partition_of_fp32_groups[mapping.param_group_index]

    def gradients(self) -> list[Tensor]:
        return list(chain(*self._optimizer.averaged_gradients.values()))


class CutWeights:
    """ZeRO 3: parameters cut up too, whole only while they are used (small ones: always)."""

    cuts_weights = cuts_optimizer = True

    def __init__(self, engine: Any) -> None:
        self._optimizer, self._rank = engine.optimizer, engine.global_rank
        self._optimizer._get_norm_groups = lambda: [0.0]  # as in `CutOptimizer`

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
        yield self.frozen(parameter)

    def frozen(self, parameter: Any) -> Part:
        share = parameter.ds_tensor.data.view(-1)
        return share, share.numel() * self._rank

    def optimizer_parts(self, parameter: Any, name: str | None) -> Iterator[Part]:
        # DeepSpeed's own way to it has the host wait for its streams
        group, first, length = self._position(parameter)
        master = self._optimizer.fp32_partitioned_groups_flat[group]
        held = self.state(parameter).get(name) if name else master.data
        if held is not None:
            yield held.view(-1)[first : first + length], length * self._rank

    def state(self, parameter: Any) -> dict[str, Any]:
        group, _, _ = self._position(parameter)
        master = self._optimizer.fp32_partitioned_groups_flat[group]
        return self._optimizer.optimizer.state.get(master, {})

    def begin_state(self, kept: Callable[[Any], bool]) -> None:
        state = self._optimizer.optimizer.state
        state.clear()
        for master in self._optimizer.fp32_partitioned_groups_flat:
            state[master] = no_moments(master)

    def _position(self, parameter: Any) -> tuple[int, int, int]:
        """Its group, where it begins in this rank's part of that, and how long its part is."""
        return self._optimizer.grad_position[self._optimizer.get_param_id(parameter)]

    def gradients(self) -> list[Tensor]:
        return list(chain(*self._optimizer.averaged_gradients.values()))


class OffloadedOptimizer(CutOptimizer):
    """ZeRO 1 and 2 with masters, moments and the gradients of this rank's part on the host."""

    def gradients(self) -> list[Tensor]:
        self._optimizer._wait_for_offload_copies()
        return [shard.grad for shard in self._optimizer.single_partition_of_fp32_groups]


class OffloadedWeights(CutWeights):
    """ZeRO 3 with them on the host."""

    def gradients(self) -> list[Tensor]:
        return [shard.grad for shard in self._optimizer.fp32_partitioned_groups_flat]


OFFLOADED: dict[int, type[Layout]] = {
    1: OffloadedOptimizer,
    2: OffloadedOptimizer,
    3: OffloadedWeights,
}
LAYOUTS: dict[int, type[Layout]] = {0: Whole, 1: CutOptimizer, 2: CutOptimizer, 3: CutWeights}


def no_moments(weights: Tensor) -> dict[str, Tensor]:
    """The state that torch's fused Adam has of weights before its first step."""
    return {
        "step": torch.zeros((), device=weights.device),
        "exp_avg": torch.zeros_like(weights),
        "exp_avg_sq": torch.zeros_like(weights),
    }


def write_rows(part: Tensor, first: int, rows: Tensor, values: Tensor) -> None:
    """Write those rows of a tensor whose flag is set in `rows` [K], values [K,...], into a flat
    part of it, in place.

    The part starts at element `first` of the whole; it may end after it, by padding.
    """
    length = min(part.numel(), values.numel() - first)
    if length <= 0:
        return
    flags = rows.view(-1, *[1] * (values.ndim - 1)).expand_as(values)
    here = slice(first, first + length)
    flags, values = flags.reshape(-1)[here], values.reshape(-1)[here].to(part)
    part[:length].copy_(torch.where(flags.to(part.device), values, part[:length]))
