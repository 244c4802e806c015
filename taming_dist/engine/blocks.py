"""What can be done to the blocks of a network before DeepSpeed takes it: recompute, compile.

A network names its blocks by their classes, `block_types`; networks without any stay as they are.
"""

import os
import shutil
from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo
from torch import nn
from torch.utils.checkpoint import checkpoint

from taming_dist.errors import UserError


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """The blocks of a network, in order."""
    kinds = getattr(network, "block_types", ())
    return [module for module in network.modules() if isinstance(module, kinds)]


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


def compile_blocks(network: nn.Module) -> None:
    """torch.compile each block on its own: blocks of the same shapes share their code, and hooks of
    ZeRO stay between them."""
    blocks = blocks_of(network)
    # A block's code is compiled once for each shape that it meets; past its limit torch would
    # silently go back to running it as it is.
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.config.recompile_limit = max(limit, 4 * len(blocks))
    for block in blocks:
        block.compile(dynamic=False)


def check_compiler(on_gpu: bool) -> None:
    """UserError where torch.compile has nothing to compile with."""
    if not on_gpu and shutil.which(os.environ.get("CXX", "g++")) is None:
        raise UserError(
            "engine.compile=true needs a C++ compiler on the CPU: install g++, or set it to false"
        )
