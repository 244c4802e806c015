"""Shorter ways on the CPU: which modules have one, and how to leave them."""

from torch import nn


class Quick(nn.Module):
    """A module that on the CPU runs by a kernel of ours where that pays, equal to rounding;
    everywhere else, and without `fast`, by torch's own operations."""

    fast = True


def run_plainly(network: nn.Module) -> None:
    """Have all of a network be computed by torch's own operations from now on."""
    for module in network.modules():
        if isinstance(module, Quick):
            module.fast = False
