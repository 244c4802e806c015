"""What can be done to the blocks of a network before DeepSpeed takes it: recompute, compile.

A network names its blocks by their classes, `block_types`; networks without any stay as they are.
One that is faster when it is compiled in one piece says so by `compiled_whole`.
"""

import os
import shutil
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from taming_dist.errors import UserError
from taming_dist.models.quick import run_plainly


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """The blocks of a network, in order."""
    kinds = getattr(network, "block_types", ())
    return [module for module in network.modules() if isinstance(module, kinds)]


def choose_way(network: nn.Module, fast: bool, lean: bool) -> bool:
    """Have a network run by kernels for GPUs if `lean` and it can, which is what it gives; without
    `fast` by torch's own everywhere."""
    if not fast:
        run_plainly(network)
    begin = getattr(network, "run_lean", None)
    return lean and begin is not None and bool(begin())


def recompute_blocks(network: nn.Module) -> None:
    """Keep only what goes into each block, and run it again in the backward pass: arXiv 1604.06174.

    Values and gradients stay the same, random numbers included; memory for a third more FLOPs.
    """
    for block in blocks_of(network):
        block.forward = _checkpointed(block.forward)


def _checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        return checkpoint(forward, *args, use_reentrant=False)

    return run


def compile_network(network: nn.Module, recompute: bool, in_pieces: bool) -> bool:
    """torch.compile what a network has to be compiled: all of it if it says so, else its blocks,
    recomputed or not; gives whether there is anything.

    `in_pieces`: blocks at most, as ZeRO 3 needs, which gathers between them.
    """
    if in_pieces or not getattr(network, "compiled_whole", False):
        return compile_blocks(network, recompute)
    if recompute:
        recompute_blocks(network)
    plain, fast = network.forward, torch.compile(network.forward, dynamic=False)
    network.forward = _with_gradients(fast, plain)
    return True


def _with_gradients(fast: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any) -> Any:
        return fast(*args) if torch.is_grad_enabled() else plain(*args)

    return run


def compile_blocks(network: nn.Module, recompute: bool) -> bool:
    """torch.compile the forward pass of each block, recomputed or not; gives whether there are any.

    It is compiled once for each class and shape, not for each block, and without the hooks around a
    block, in which ZeRO gathers. Where no gradient is followed (previews, validation, sampling)
    blocks run as they are: other sizes would be compiled anew, for a few batches.
    """
    import torch._dynamo  # takes seconds, and few runs need it before their first step

    blocks = blocks_of(network)
    # Past its limit of shapes for one function torch would silently run it as it is.
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = max(limit, 2 * len(blocks))
    for block in blocks:
        block.forward = _compiled(block, recompute)
    return bool(blocks)


def _compiled(block: nn.Module, recompute: bool) -> Callable[..., Any]:
    kind: Any = type(block)  # mypy: classes of modules are not Hashable
    return _with_gradients(partial(_compiled_forward(kind, recompute), block), block.forward)


@cache
def _compiled_forward(kind: Any, recompute: bool) -> Callable[..., Any]:
    """The one compiled function of all blocks of a class: they come as its first argument."""
    forward = _checkpointed(kind.forward) if recompute else kind.forward
    return torch.compile(forward, dynamic=False)


def check_compiler(on_gpu: bool) -> None:
    """UserError where torch.compile has nothing to compile with."""
    if not on_gpu and shutil.which(os.environ.get("CXX", "g++")) is None:
        raise UserError(
            "engine.compile=true needs a C++ compiler on the CPU: install g++, or set it to false"
        )
