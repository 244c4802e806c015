"""Floating-point operations of a network's passes, counted by layer, without computing anything.

Counted are products: convolutions, linear layers, products of matrices and attention, two
operations for a multiplication and its sum. Attention counts whole, also what a causal mask leaves
out, as is usual (arXiv 2204.02311, appendix B). A backward pass takes as much again for each factor
that has a gradient. What is computed twice to save memory counts once.
"""

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


def _convolution(result: Tensor, x: Tensor, weight: Tensor, *_: Any) -> int:
    return 2 * result.numel() * prod(weight.shape[1:])


def _transposed(result: Tensor, x: Tensor, weight: Tensor, *_: Any) -> int:
    return 2 * x.numel() * prod(weight.shape[1:])


def _product(result: Tensor, left: Tensor, *_: Any) -> int:
    return 2 * result.numel() * left.shape[-1]


def _sum_and_product(result: Tensor, added: Tensor, left: Tensor, *_: Any) -> int:
    return _product(result, left)


def _attention(result: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any) -> int:
    return 2 * prod(query.shape[:-1]) * key.shape[-2] * (query.shape[-1] + value.shape[-1])


def _einsum(result: Tensor, equation: str, *factors: Tensor) -> int:
    names = equation.replace(" ", "").split("->")[0].split(",")
    axes: dict[str, int] = {}
    for name, factor in zip(names, factors, strict=True):
        axes |= dict(zip(name, factor.shape, strict=True))
    return 2 * prod(axes.values())


class Kind(NamedTuple):
    """How an operation is counted, from its result and its arguments, and which of these are the
    two factors. (Attention is two products, of two each: its gradients all come together.)"""

    flops: Callable[..., int]
    factors: tuple[int, int] = (0, 1)


KINDS: dict[Callable[..., Any], Kind] = {
    F.conv1d: Kind(_convolution),
    F.conv2d: Kind(_convolution),
    F.conv_transpose2d: Kind(_transposed),
    F.linear: Kind(_product),
    torch.matmul: Kind(_product),
    Tensor.matmul: Kind(_product),
    Tensor.__matmul__: Kind(_product),
    torch.addmm: Kind(_sum_and_product, (1, 2)),
    torch.einsum: Kind(_einsum, (1, 2)),
    F.scaled_dot_product_attention: Kind(_attention, (0, 2)),
}


class Flops(TorchFunctionMode):
    """Counts what runs while it is entered, on torch's meta device: `forward`, and `backward`, what
    the gradients of it will take."""

    def __init__(self) -> None:
        super().__init__()
        self.forward = self.backward = 0

    @property
    def total(self) -> int:
        """Both passes."""
        return self.forward + self.backward

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in KINDS:
            kind = KINDS[func]
            flops = kind.flops(result, *args)
            self.forward += flops
            if result.requires_grad:
                self.backward += flops * sum(args[n].requires_grad for n in kind.factors)
        return result
