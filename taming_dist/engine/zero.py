"""DeepSpeed: one engine per trained network, at any ZeRO stage.

Traps of DeepSpeed that are closed here, each with a test: its default clips gradients to norm 1;
its setting of the bucket's size does not reach ZeRO 0, nor that of the dtype of reductions ZeRO 1
to 3 next to autocast; autograd.grad through an engine's output fires its reduction hooks (recipes
cut the graph at the reconstruction instead); its scaler of fp16 losses does not go with autocast
(see `taming_dist.engine.scaling`); its optimizers and timers have the host wait for the device.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from taming_dist.engine.average import WeightAverage
from taming_dist.engine.blocks import blocks_of, choose_way, compile_network, recompute_blocks
from taming_dist.engine.compiling import Recompilations
from taming_dist.engine.former import former_average, load_former
from taming_dist.engine.graphs import record_passes
from taming_dist.engine.layouts import LAYOUTS, OFFLOADED, Layout, write_rows
from taming_dist.engine.partition import gather_as_one, gathered
from taming_dist.engine.pieces import Pieces, copied
from taming_dist.engine.sameness import difference, digests
from taming_dist.engine.scaling import LossScale
from taming_dist.engine.settings import PRECISIONS, REDUCTIONS, EngineConfig, deepspeed_config
from taming_dist.engine.snapshot import SCALARS, Snapshot, not_finite
from taming_dist.engine.spikes import Spikes
from taming_dist.engine.start import load_deepspeed
from taming_dist.engine.state import EngineState
from taming_dist.engine.world import World
from taming_dist.formats.strict_json import read_json


class Optimizer(Protocol):
    """What an engine needs of `taming_dist.training.optimization.OptimConfig`."""

    name: str
    betas: list[float]
    weight_decay: float
    clip: float


class Engine:
    """One trained network under DeepSpeed, with its optimizer.

    `engine(x)` runs the network with the hooks that gather and reduce; `engine.module` is the bare
    network, for passes in which it must not collect gradients. `backward` and `step` are called
    once per micro-batch; the weights move at every `accumulation`-th step, unless a loss or the
    gradient of some rank is not finite: then no rank moves, nor does the average of the weights.
    With `skip_spikes` the same goes for gradients whose norm stands out by more than so many
    standard deviations (`taming_dist.engine.spikes`). `moved` and `spiked`, scalars on the device,
    tell, the same on all ranks, what became of the last optimizer step: the host does not wait.

    With `ema_half_life` (images; 0 for none) an average of the weights is kept, cut up as ZeRO cuts
    the optimizer; `evaluated` and `full_state` then give the averaged weights.

    `module` comes from `build_network`: at ZeRO 3 it is cut up already.
    """

    def __init__(
        self,
        module: nn.Module,
        groups: list[dict[str, Any]],
        optimizer: Optimizer,
        config: EngineConfig,
        world: World,
        micro_batch: int,
        accumulation: int,
        ema_half_life: int = 0,
        skip_spikes: float = 0.0,
    ) -> None:
        assert config.zero < 3 or all(hasattr(p, "ds_id") for p in module.parameters())
        kind = torch.optim.AdamW if optimizer.name == "adamw" else torch.optim.Adam
        self._optimizer: Any = kind(
            groups,
            lr=0.0,
            betas=(optimizer.betas[0], optimizer.betas[1]),
            weight_decay=optimizer.weight_decay,
            fused=True,  # the one that can be told on the device to do nothing
        )
        self.config = config
        self.world = world
        self.lr = 0.0
        self.moved = torch.ones((), dtype=torch.bool, device=world.device)
        self.spiked = torch.zeros_like(self.moved)
        self._spikes = Spikes(skip_spikes, world.device)
        self._clip = optimizer.clip
        self._norm: Tensor | None = None  # of the last gradient that was followed; NaN: of none yet
        self._skipped = torch.zeros((), device=world.device)  # optimizer steps, of this window
        self._recompilations: Recompilations | None = None
        if config.compile and compile_network(module, config.recompute, config.zero == 3):
            self._recompilations = Recompilations()
            if config.zero == 3:
                gather_as_one(blocks_of(module))
        elif config.recompute:
            recompute_blocks(module)
        self.lean = choose_way(module, config.fast, config.runs_lean(world.device))
        if config.graphs:
            record_passes(module)
        self._engine, *_ = load_deepspeed().initialize(
            model=module.to(world.device),
            optimizer=self._optimizer,
            config=deepspeed_config(config, micro_batch, accumulation, world.overlaps),
            dist_init_required=False,
        )
        layouts = OFFLOADED if config.offload == "optimizer" else LAYOUTS
        self._layout: Layout = layouts[config.zero](self._engine)
        self._set_up_reduction()
        self._scale = LossScale(world.device) if config.precision == "fp16" else None
        if self._scale is not None:
            self._scale_ourselves()
        self._unpublished = False
        self._average: WeightAverage | None = None
        if ema_half_life > 0:
            images_per_step = micro_batch * accumulation * world.world_size
            self._average = WeightAverage(self.masters(), ema_half_life, images_per_step)

    @property
    def module(self) -> Any:
        """The bare network."""
        return self._engine.module

    def __call__(self, *args: Any) -> Any:
        self._publish_late()
        return self._engine(*args)

    def _set_up_reduction(self) -> None:
        """The dtype in which gradients are added up over ranks."""
        if self.config.zero == 0:
            return
        # Next to autocast its ZeRO optimizers leave the setting of the dtype aside.
        optimizer, dtype = self._engine.optimizer, REDUCTIONS[self.config.reduce]
        (bucket,) = optimizer.ipg_buckets.values()
        optimizer.ipg_buckets = {dtype: bucket}
        optimizer.get_param_comm_dtype = lambda parameter: dtype

    def _scale_ourselves(self) -> None:
        """Switch DeepSpeed's scaler of losses off; see `taming_dist.engine.scaling`."""
        if self.config.zero == 0:
            self._engine.torch_autocast_z0_gradscaler = None
        else:
            self._engine.optimizer.torch_autocast_gradscaler = None

    @property
    def loss_scale(self) -> float | Tensor:
        """The factor on losses while their gradients are taken; 1 but for fp16."""
        return 1.0 if self._scale is None else self._scale.value

    def gradients_at(self, loss: Tensor, *leaves: Tensor) -> list[Tensor]:
        """d loss / d leaf of each, past the engine, for leaves in fp32: scaled on the way there, as
        networks in fp16 need it; zeros where the loss does not depend on one. Nothing else collects
        a gradient."""
        found = torch.autograd.grad(loss * self.loss_scale, leaves, materialize_grads=True)
        return [scaled / self.loss_scale for scaled in found]

    def backward(self, loss: Tensor, value: Tensor | None = None) -> None:
        """Add the gradients of one micro-batch, averaged over ranks and micro-batches.

        `value`: the loss itself, where `loss` is a surrogate that only has its gradient. One that
        is not finite spoils the gradient of all ranks, so that they skip the step together,
        without waiting for the device to tell.
        """
        loss = loss * (1 + 0 * (loss if value is None else value).detach())
        self._engine.backward(loss * self.loss_scale)

    def step(self) -> None:
        """Count one micro-batch; after the last one move the weights and drop the gradients."""
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()
            return
        self._judge()
        self._engine.step()
        self._skipped = self._skipped + ~self.moved
        if self._scale is not None:
            self._scale.update(self.moved | self.spiked)
        if self._average is not None:
            self._average.update(self.masters(), self.moved.to(self._host_or_device))
        if self._recompilations is not None:
            self._recompilations.step_done()

    @torch.no_grad()
    def _judge(self) -> None:
        """Decide what becomes of the gradient, on the device and the same on all ranks, and leave
        it with torch's fused optimizer as its GradScaler does: it divides by `grad_scale`, which
        takes the loss scale back and clips, and where `found_inf` is 1 it does nothing."""
        norm = self._gradient_norm() / self.loss_scale
        self.moved = self._spikes.judge(norm)
        self.spiked = norm.isfinite() & ~self.moved
        before = torch.full_like(norm, torch.nan) if self._norm is None else self._norm
        self._norm = torch.where(self.moved, norm, before)
        divisor = self.loss_scale
        if self._clip > 0:
            divisor = ((norm + 1e-6) / self._clip).clamp(min=1) * divisor
        there = self._host_or_device
        self._optimizer.grad_scale = divisor.to(there) if isinstance(divisor, Tensor) else None
        self._optimizer.found_inf = (~self.moved).float().to(there)

    @property
    def _host_or_device(self) -> torch.device:
        """Where the optimizer moves the weights."""
        return torch.device("cpu") if self.config.offload == "optimizer" else self.world.device

    def _gradient_norm(self) -> Tensor:
        """The norm of the whole gradient, as it is scaled."""
        norms = torch._foreach_norm(self._layout.gradients(), 2, torch.float32)
        squared = torch.stack(norms).square().sum().to(self.world.device)
        return (self.world.sum(squared) if self.config.zero > 0 else squared).sqrt()

    def masters(self) -> list[Tensor]:
        """The fp32 numbers that this rank's optimizer moves, as DeepSpeed keeps them."""
        return self._layout.masters()

    def set_lr(self, lr: float) -> None:
        """The learning rate of the next optimizer step, for all groups."""
        self.lr = lr
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr

    def window_metrics(self) -> dict[str, float | Tensor]:
        """Learning rate, norm of the last gradient before clipping, and how many optimizer steps
        were skipped since the last call; the loss scale where there is one, and with engine.compile
        how often torch compiled again after the first step, on this rank."""
        metrics: dict[str, float | Tensor] = {"lr": self.lr, "skipped_steps": self._skipped}
        self._skipped = torch.zeros_like(self._skipped)
        if self._norm is not None:
            metrics["gradient_norm"] = self._norm
        if self._scale is not None:
            metrics["loss_scale"] = self._scale.value
        if self._recompilations is not None:
            metrics["recompilations"] = float(self._recompilations.take())
        return metrics

    @contextmanager
    def autocast(self) -> Iterator[None]:
        """The precision of the engine for passes that do not go through `engine(...)`."""
        dtype = PRECISIONS[self.config.precision]
        if dtype is None:
            yield
            return
        with torch.autocast(self.world.device.type, dtype):
            yield

    @torch.no_grad()
    def assign(self, parameter: nn.Parameter, value: Tensor) -> None:
        """Set a parameter of the network to a value of its whole shape, the same on all ranks, and
        with it the optimizer's copy."""
        everyone = torch.ones(len(value), dtype=torch.bool, device=value.device)
        self._write(parameter, everyone, value)

    @torch.no_grad()
    def replace_rows(self, parameter: nn.Parameter, rows: Tensor, values: Tensor) -> None:
        """Write those rows of a parameter [K,...] whose flag is set in `rows` [K], values [K,...];
        the optimizer forgets its moments of them.

        All ranks give the same; each writes the part that it holds, and nothing is sent.
        """
        self._write(parameter, rows, values)
        for name in ("exp_avg", "exp_avg_sq"):
            for part, first in self._layout.optimizer_parts(parameter, name):
                write_rows(part, first, rows, torch.zeros_like(values))
        if self._average is not None:  # where the old rows would live on
            for part, first in self._layout.optimizer_parts(parameter, None):
                write_rows(self._average.beside(part, self.masters()), first, rows, values)

    def _write(self, parameter: nn.Parameter, rows: Tensor, values: Tensor) -> None:
        """Write rows of a parameter and of its master, this rank's parts."""
        for part, first in self._layout.weights(parameter):
            write_rows(part, first, rows, values)
        for part, first in self._layout.optimizer_parts(parameter, None):
            write_rows(part, first, rows, values)

    def snapshot(self) -> Snapshot:
        """Weights, moments, average and buffers as they are now, each rank what it has of them, in
        memory that training does not touch (collective). Those that are not finite, or
        not the same on all ranks, are not copied."""
        self._publish_late()
        world, state = self.world, self._state
        mine = state.pieces(world.rank, world.world_size)
        pieces = list(chain(mine, state.buffers() if world.is_first else ()))
        told = world.gather((state.steps(), not_finite(pieces), digests(state.whole())))
        fault = next((name for _, name, _ in told if name is not None), None)
        apart = difference([sums for _, _, sums in told])
        scalars: dict[str, Any] = {
            "steps": {k: v for steps, _, _ in told for k, v in steps.items()},
            "spikes": self._spikes.state_dict(),
        }
        if self._average is not None:
            scalars["average_steps"] = int(self._average.steps)
        if self._scale is not None:
            scalars["loss_scale"] = self._scale.state_dict()
        copies = copied(pieces) if fault is None and apart is None else []
        firsts = scalars if world.is_first else None
        return Snapshot(copies, firsts, world.rank, world.world_size, fault, apart)

    def load(self, folder: Path, name: str) -> None:
        """Read what snapshots wrote, by any number of ranks and any stage (collective).

        Betas and weight decay stay those of this engine: a resumed run may have others.

        Raises:
            UserError: it is of another network, or not whole.
        """
        here = folder / name
        if not (here / SCALARS).is_file():
            self._load_former(folder, name)
            return
        scalars: dict[str, Any] = read_json(here / SCALARS)
        self._state.fill(Pieces(here, self.world.rank), scalars["steps"])
        self._layout.publish()
        self._spikes.load_state_dict(scalars.get("spikes", {}))
        if self._average is not None:
            self._average.steps.fill_(scalars["average_steps"])
        if self._scale is not None and "loss_scale" in scalars:  # not of a run in fp32 or bf16
            self._scale.load_state_dict(scalars["loss_scale"])

    @property
    def _state(self) -> EngineState:
        return EngineState(self.module, self._layout, self._average)

    def _load_former(self, folder: Path, name: str) -> None:
        """Read a checkpoint of before (`taming_dist.engine.former`)."""
        ours = load_former(self._engine, folder, name, self.config.zero)
        if self._scale is not None and "our_loss_scale" in ours:
            self._scale.load_state_dict(ours["our_loss_scale"])
        if self._average is not None:
            part = self.world.rank if self.config.zero > 0 else 0
            self._average.load(former_average(folder / name, part))

    @contextmanager
    def evaluated(self) -> Iterator[Any]:
        """The network in eval mode with the weights that count: the averaged ones where they are
        kept, which take the place of the trained ones for the while (collective).

        At ZeRO 3 all ranks run it together.
        """
        training = [module for module in self.module.modules() if module.training]
        with self._averaged():
            self.module.eval()
            try:
                yield self.module
            finally:
                for module in training:
                    module.training = True

    def root_weights(self) -> AbstractContextManager[None]:
        """For methods of the network other than its forward, which is where ZeRO 3 gathers: the
        weights that belong to none of its submodules are whole for the while (collective)."""
        return self._gathered(*self.module.parameters(recurse=False))

    def full_state(self) -> dict[str, Tensor] | None:
        """All weights and buffers by name, whole, on the CPU; None but on rank 0 (collective).

        The weights are the averaged ones where they are kept. One at a time is gathered, so that
        no rank holds the whole network on its device at ZeRO 3.
        """
        state: dict[str, Tensor] = {}
        with self._averaged():
            for name, parameter in self.module.named_parameters():
                with self._gathered(parameter):
                    if self.world.is_first:
                        state[name] = parameter.detach().to("cpu", copy=True)
        if not self.world.is_first:
            return None
        buffers = self.module.named_buffers()
        return state | {name: part.to("cpu", copy=True) for name, part in buffers}

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """The averaged weights, where they are kept, in the place of the trained ones."""
        self._publish_late()
        if self._average is None:
            yield
            return
        self._average.exchange(self.masters())
        self._layout.publish()
        try:
            yield
        except BaseException:
            self._average.exchange(self.masters())
            self._unpublished = True  # this rank may be alone in its error: nothing can be sent
            raise
        self._average.exchange(self.masters())
        self._layout.publish()

    def _publish_late(self) -> None:
        """After an evaluation that failed, bring the trained weights back to where forward takes
        them from (collective)."""
        if self._unpublished:
            self._layout.publish()
            self._unpublished = False

    def _gathered(self, *parameters: nn.Parameter) -> AbstractContextManager[None]:
        return gathered(self.config, parameters)
