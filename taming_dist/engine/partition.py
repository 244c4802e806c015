"""Networks that ZeRO 3 cuts up over the ranks, and below it does not: made, filled, gathered."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from taming_dist.engine.settings import EngineConfig, deepspeed_config
from taming_dist.engine.start import load_deepspeed
from taming_dist.engine.world import World
from taming_dist.errors import UserError
from taming_dist.models.joined import stored_parameters

# what torch says on a CPU of more than there is, and of more than can be counted
NO_MEMORY = ("can't allocate memory", "Storage size calculation overflowed")


@contextmanager
def gathered(
    config: EngineConfig, parameters: Sequence[nn.Parameter], writer: int | None = None
) -> Iterator[None]:
    """Parameters whole on every rank; what the rank `writer` makes of them stays (collective)."""
    if config.zero < 3 or not parameters:
        yield
        return
    with load_deepspeed().zero.GatheredParameters(parameters, modifier_rank=writer):
        yield


def gather_as_one(modules: Sequence[nn.Module]) -> None:
    """Have ZeRO 3 gather all weights inside of a module when it is entered, and have no hooks
    within: torch.compile would follow them, and compile each anew."""
    for module in modules:
        load_deepspeed().utils.set_z3_leaf_module(module, True)


def build_network(
    make: Callable[[], nn.Module],
    config: EngineConfig,
    world: World,
    initial: Mapping[str, Tensor] | None = None,
) -> Any:
    """A network for an engine: at ZeRO 3 it is cut up over the ranks while it is made, and no rank
    ever has the whole of it on its device (collective).

    `initial`: weights and buffers to start from by name, the same on all ranks; parameters that are
    missing there start as they are drawn.

    Raises:
        UserError: there is not the memory for it.
    """
    try:
        with partitioning(config, world):
            network = make()
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and not any(
            said in str(error) for said in NO_MEMORY
        ):
            raise
        raise UserError(
            "a network does not fit in memory: make it smaller (+dry_run=true counts what it "
            "takes), or cut it up over more ranks with engine=zero3"
        ) from error
    if initial is not None:
        load_weights(network, initial, config)
    return network


@torch.no_grad()
def load_weights(network: nn.Module, state: Mapping[str, Tensor], config: EngineConfig) -> None:
    """`load_state_dict` of a network that may be cut up: one parameter at a time (collective).
    Parameters that are missing in `state` stay as they are."""
    parameters = list(stored_parameters(network))
    buffers = dict(state)
    for stored in parameters:
        buffers.pop(stored.name, None)
    absent, unknown = network.load_state_dict(buffers, strict=False)
    assert set(absent) == {stored.source for stored in parameters}
    assert not unknown
    for stored in parameters:
        if stored.name not in state:
            continue
        with gathered(config, [stored.parameter], writer=0):
            part = stored.of(stored.parameter)
            assert part.shape == state[stored.name].shape, stored.name
            part.copy_(state[stored.name])


@contextmanager
def partitioning(config: EngineConfig, world: World) -> Iterator[None]:
    """Networks that are made inside are cut up over the ranks at ZeRO 3.

    Their tensors are made as they would be elsewhere, and so have the same first values.
    """
    if config.zero < 3:
        yield
        return
    settings = deepspeed_config(config, 1, 1, world.overlaps)
    with load_deepspeed().zero.Init(config_dict_or_path=settings, tensor_overrides=[]):
        yield
