"""Passes of a network that are recorded once in CUDA graphs and then replayed, both directions.

A step of E and G is hundreds of launches each way, for which Python takes longer than a fast card
for the work; a replay is one launch. A network names the methods that may be recorded by `passes`:
tensor in, tensors out, on static shapes, without waiting for the device. What comes out lies where
the next replay writes, so that it must be used up before the next micro-batch.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

WARM_UPS = 3  # as the libraries under the kernels ask for
Found = Tensor | tuple[Tensor, ...]


def record_passes(network: nn.Module) -> bool:
    """Have the passes that a network names be recorded when it is trained; gives whether there are
    any. Without gradients, and in evaluation, they run as they are."""
    names: Sequence[str] = getattr(network, "passes", ())
    for name in names:
        setattr(network, name, Recorded(network, getattr(network, name)))
    return len(names) > 0


class Key(NamedTuple):
    """What a recorded pass is for."""

    shape: torch.Size
    dtype: torch.dtype
    follows: bool  # a gradient goes to the input as well
    precision: torch.dtype | None  # of autocast


class Recorded:
    """A method of a network, recorded for each `Key` that comes."""

    def __init__(self, network: nn.Module, plain: Callable[[Tensor], Found]) -> None:
        self._network, self._plain = network, plain
        self._kept: dict[Key, Pass] = {}

    def __call__(self, x: Tensor) -> Found:
        if not (self._network.training and torch.is_grad_enabled()):
            return self._plain(x)
        device = x.device.type
        precision = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        key = Key(x.shape, x.dtype, x.requires_grad, precision)
        if key not in self._kept:
            parameters = [p for p in self._network.parameters() if p.requires_grad]
            self._kept[key] = Pass(self._plain, x, parameters, precision)
        kept = self._kept[key]
        found: tuple[Tensor, ...] = _Replayed.apply(kept, x, *kept.parameters)
        return found if kept.is_tuple else found[0]


class Pass:
    """One shape of a method: static tensors, and what fills them."""

    def __init__(
        self,
        run: Callable[[Tensor], Found],
        x: Tensor,
        parameters: Sequence[nn.Parameter],
        precision: torch.dtype | None,
    ) -> None:
        self._run, self._precision = run, precision
        self.x = x.detach().clone().requires_grad_(x.requires_grad)
        self.parameters, self.is_tuple = list(parameters), False
        self.found: tuple[Tensor, ...] = ()
        self.gradients: tuple[Tensor, ...] = ()
        self.upstream: list[Tensor] = []
        self.forward: Callable[[], None] = self._forward
        self.backward: Callable[[], None] = self._backward
        on_gpu = x.device.type == "cuda"
        with torch.random.fork_rng([x.device] if on_gpu else []):  # masks are drawn as without it
            self._prepare()
            if on_gpu:
                self._record()

    def _forward(self) -> None:
        device, dtype = self.x.device.type, self._precision
        # a recorded pass must cast the weights of its own time
        with (
            torch.enable_grad(),
            torch.autocast(device, dtype, enabled=dtype is not None, cache_enabled=False),
        ):
            found = self._run(self.x)
        self.is_tuple = isinstance(found, tuple)
        self.found = found if isinstance(found, tuple) else (found,)

    def _backward(self) -> None:
        if self.upstream:  # none where all of it is frozen
            self.gradients = torch.autograd.grad(self._followed(), self._wanted(), self.upstream)

    def _followed(self) -> list[Tensor]:
        return [tensor for tensor in self.found if tensor.requires_grad]

    def _wanted(self) -> list[Tensor]:
        return [*([self.x] if self.x.requires_grad else []), *self.parameters]

    def _prepare(self) -> None:
        """Find out which parameters it uses, and make room for what comes from above."""
        self._forward()
        self.upstream = [torch.zeros_like(tensor) for tensor in self._followed()]
        gradients: Sequence[Tensor | None] = [None] * len(self.parameters)
        if self.upstream:
            gradients = torch.autograd.grad(
                self._followed(), self.parameters, self.upstream, allow_unused=True
            )
        pairs = zip(self.parameters, gradients, strict=True)
        self.parameters = [parameter for parameter, gradient in pairs if gradient is not None]

    def _record(self) -> None:
        """Have both directions be CUDA graphs. Recording runs nothing."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                self._forward()
                self._backward()
            self.found = self.gradients = ()
        torch.cuda.current_stream().wait_stream(side)
        pool = torch.cuda.graph_pool_handle()  # the backward pass reads what the forward pass keeps
        graphs = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        for graph, direction in zip(graphs, (self._forward, self._backward), strict=True):
            # other threads may use the GPU meanwhile
            with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
                direction()
        self.forward, self.backward = graphs[0].replay, graphs[1].replay


class _Replayed(torch.autograd.Function):
    """A replay forwards and, for the same input, backwards."""

    @staticmethod
    def forward(ctx: Any, kept: Pass, x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.kept = kept
        with torch.no_grad():
            kept.x.copy_(x)
        kept.forward()
        found = tuple(tensor.detach() for tensor in kept.found)
        pairs = zip(found, kept.found, strict=True)
        ctx.mark_non_differentiable(*(mine for mine, was in pairs if not was.requires_grad))
        return found

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        kept: Pass = ctx.kept
        followed = [
            gradient
            for gradient, tensor in zip(gradients, kept.found, strict=True)
            if tensor.requires_grad
        ]
        torch._foreach_copy_(kept.upstream, followed)
        kept.backward()
        # copies: whoever adds them up may keep them until the next replay, and beyond
        found = list(torch._foreach_mul(kept.gradients, 1))
        return None, found.pop(0) if kept.x.requires_grad else None, *found
