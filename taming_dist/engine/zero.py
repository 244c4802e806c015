"""DeepSpeed: one engine per trained network, at any ZeRO stage. The only import of deepspeed.

Traps of DeepSpeed that are closed here, each with a test: its default clips gradients to norm 1;
its CPU backend compiles an extension at start; its groups ignore the timeout; autograd.grad through
an engine's output fires its reduction hooks (recipes cut the graph at the reconstruction instead);
its scaler of fp16 losses does not go with autocast (see `taming_dist.engine.scaling`).
"""

import logging
import math
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from taming_dist.engine.blocks import compile_blocks, recompute_blocks
from taming_dist.engine.ema import WeightAverage
from taming_dist.engine.scaling import LossScale
from taming_dist.engine.settings import PRECISIONS, EngineConfig, deepspeed_config
from taming_dist.engine.tf32 import EXACT, TF32
from taming_dist.engine.world import DEFAULT_TIMEOUT, World, choose_device, rendezvous
from taming_dist.errors import UserError
from taming_dist.launch import Place
from taming_dist.models.export import assemble


@cache
def load_deepspeed() -> ModuleType:
    """Import DeepSpeed, which takes seconds, when it is first needed, with its traps closed."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    # It calls collectives by the names that every torch of our range has; newer ones warn of them.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    # Only inference uses this extension; building it takes minutes on a small CPU machine, and a
    # build that is killed leaves a lock on which every later start would hang.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


class Optimizer(Protocol):
    """What an engine needs of `taming_dist.training.optimization.OptimConfig`."""

    name: str
    betas: list[float]
    weight_decay: float
    clip: float


def init_world(here: Place, tf32: TF32 = EXACT, timeout: timedelta = DEFAULT_TIMEOUT) -> World:
    """Join the process group (nccl on GPUs, else gloo), also for a single process."""
    os.environ.update(rendezvous(here))
    device = choose_device(here.local_rank, tf32)
    deepspeed = load_deepspeed()
    from deepspeed.comm.torch import TorchBackend

    # DeepSpeed's groups ignore the timeout that init_distributed is given.
    TorchBackend.new_group = lambda self, ranks: dist.new_group(ranks, timeout=timeout)
    deepspeed.init_distributed(
        dist_backend="nccl" if device.type == "cuda" else "gloo",
        timeout=timeout,
        auto_mpi_discovery=False,
        verbose=False,
    )
    return World(here.rank, here.world_size, here.local_rank, device)


def shutdown() -> None:
    """Leave the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def swapped(tensors: list[Tensor], values: list[Tensor]) -> Iterator[None]:
    """Put values into tensors for the while."""
    kept = [tensor.clone() for tensor in tensors]
    with torch.no_grad():
        torch._foreach_copy_(tensors, values)
        yield
        torch._foreach_copy_(tensors, kept)


class Engine:
    """One trained network under DeepSpeed, with its optimizer.

    `engine(x)` runs the network with the hooks that gather and reduce; `engine.module` is the bare
    network, for passes in which it must not collect gradients. `backward` and `step` are called
    once per micro-batch; the weights move at every `accumulation`-th step, unless a loss or the
    gradient of some rank is not finite: then no rank moves, nor does the average of the weights.
    `moved` tells, the same on all ranks, what the last optimizer step did.

    With `ema_half_life` (images; 0 for none) an average of the weights is kept, cut up as ZeRO cuts
    the optimizer; `evaluated` and `full_state` then give the averaged weights.
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
    ) -> None:
        on_gpu = world.device.type == "cuda"
        kind = torch.optim.AdamW if optimizer.name == "adamw" else torch.optim.Adam
        torch_optimizer = kind(
            groups,
            lr=0.0,
            betas=(optimizer.betas[0], optimizer.betas[1]),
            weight_decay=optimizer.weight_decay,
            fused=on_gpu,
        )
        self.config = config
        self.world = world
        self.lr = 0.0
        self.moved = True
        self.skipped_in_a_row = 0
        self._clip = optimizer.clip
        self._norm: float | None = None  # of the last gradient that was followed
        self._skipped = 0  # optimizer steps since the last window
        if config.recompute:
            recompute_blocks(module)
        if config.compile:
            compile_blocks(module)
        self._engine, *_ = load_deepspeed().initialize(
            model=module.to(world.device),
            optimizer=torch_optimizer,
            config=deepspeed_config(config, optimizer.clip, micro_batch, accumulation, on_gpu),
            dist_init_required=False,
        )
        self._scale = LossScale() if config.precision == "fp16" else None
        if self._scale is not None:
            self._give_scale(self._scale.value)
        self._average: WeightAverage | None = None
        if ema_half_life > 0:
            images_per_step = micro_batch * accumulation * world.world_size
            self._average = WeightAverage(self.masters(), ema_half_life, images_per_step)

    @property
    def module(self) -> Any:
        """The bare network."""
        return self._engine.module

    def __call__(self, *args: Any) -> Any:
        return self._engine(*args)

    def _give_scale(self, scale: float) -> None:
        """Put our factor in the place of DeepSpeed's scaler; see `taming_dist.engine.scaling`."""
        if self.config.zero == 0:
            self._engine.torch_autocast_z0_gradscaler = None
        else:
            self._engine.optimizer.torch_autocast_gradscaler = None
            self._engine.optimizer.override_loss_scale(scale)

    @property
    def loss_scale(self) -> float:
        """The factor on losses while their gradients are taken; 1 but for fp16."""
        return 1.0 if self._scale is None else self._scale.value

    def gradient(self, loss: Tensor, at: Tensor) -> Tensor:
        """d loss / d at, past the engine, for a leaf `at` in fp32: scaled on the way there, as
        networks in fp16 need it. Nothing else collects a gradient."""
        (scaled,) = torch.autograd.grad(loss * self.loss_scale, at)
        return scaled / self.loss_scale

    def backward(self, loss: Tensor, value: Tensor | None = None) -> None:
        """Add the gradients of one micro-batch, averaged over ranks and micro-batches.

        `value`: the loss itself, where `loss` is a surrogate that only has its gradient. One that
        is not finite spoils the gradient of all ranks, so that they skip the step together,
        without waiting for the device to tell.
        """
        loss = loss * (1 + 0 * (loss if value is None else value).detach())
        # above ZeRO 0 DeepSpeed multiplies by the factor that it was given
        self._engine.backward(loss * self.loss_scale if self.config.zero == 0 else loss)

    def step(self) -> None:
        """Count one micro-batch; after the last one move the weights and drop the gradients."""
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()
            return
        if self.config.zero == 0:
            moved = self._prepare_whole_gradients()
            self._engine.step()
        else:
            self._engine.step()
            moved = self._engine.was_step_applied()
            if moved:
                self._norm = float(self._engine.get_global_grad_norm())
        self.moved = moved
        self._skipped += not moved
        self.skipped_in_a_row = 0 if moved else self.skipped_in_a_row + 1
        if self._scale is not None:
            self._scale.update(overflowed=not moved)
            self._give_scale(self._scale.value)
        if moved and self._average is not None:
            self._average.update(self.masters())

    def _prepare_whole_gradients(self) -> bool:
        """At ZeRO 0, what DeepSpeed does above it: unscale, clip, and, should the gradient not be
        finite, drop it, so that the optimizer finds nothing to do. Gives whether it is finite.

        It is averaged over ranks already, so that all of them find the same.
        """
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None]
        if self._scale is not None:
            torch._foreach_div_(gradients, self._scale.value)
        norm = float(nn.utils.get_total_norm(gradients))
        if not math.isfinite(norm):
            self.module.zero_grad(set_to_none=True)
            return False
        if 0 < self._clip < norm:
            torch._foreach_mul_(gradients, self._clip / (norm + 1e-6))
        self._norm = norm
        return True

    def masters(self) -> list[Tensor]:
        """The fp32 numbers that this rank's optimizer moves, as DeepSpeed keeps them."""
        optimizer = self._engine.optimizer
        if self.config.zero == 0:
            return [parameter.data for parameter in self.module.parameters()]
        if self.config.zero == 3:
            return [shard.data for shard in optimizer.fp32_partitioned_groups_flat]
        return [shard.data for shard in optimizer.single_partition_of_fp32_groups]

    def set_lr(self, lr: float) -> None:
        """The learning rate of the next optimizer step, for all groups."""
        self.lr = lr
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr

    def window_metrics(self) -> dict[str, float]:
        """Learning rate, norm of the last gradient before clipping, and how many optimizer steps
        were skipped since the last call; the loss scale where there is one."""
        metrics = {"lr": self.lr, "skipped_steps": float(self._skipped)}
        self._skipped = 0
        if self._norm is not None:
            metrics["gradient_norm"] = self._norm
        if self._scale is not None:
            metrics["loss_scale"] = self._scale.value
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
        everything = torch.arange(len(value), device=value.device)
        for part, first in self._weights_held(parameter):
            write_rows(part, first, everything, value)

    @torch.no_grad()
    def replace_rows(self, parameter: nn.Parameter, rows: Tensor, values: Tensor) -> None:
        """Write rows [m] of a parameter, values [m,...]; the optimizer forgets its moments of them.

        All ranks give the same; each writes the part that it holds, and nothing is sent.
        """
        for part, first in self._weights_held(parameter):
            write_rows(part, first, rows, values)
        for name in ("exp_avg", "exp_avg_sq"):
            for part, first in self._optimizer_parts(parameter, name):
                write_rows(part, first, rows, torch.zeros_like(values))
        if self._average is not None:  # where the old rows would live on
            with swapped(self.masters(), self._average.shards):
                for part, first in self._optimizer_parts(parameter, None):
                    write_rows(part, first, rows, values)
                self._average.set(self.masters())

    def _weights_held(self, parameter: Any) -> Iterator[tuple[Tensor, int]]:
        """This rank's parts of a parameter and of its fp32 copy, flat, each with the index of its
        first element in the whole."""
        if self.config.zero > 0 and parameter.data.numel():  # at stage 3 it is empty while unused
            yield parameter.data.view(-1), 0
        if self.config.zero == 3:
            share = parameter.ds_tensor.data.view(-1)
            yield share, share.numel() * self.world.rank
        yield from self._optimizer_parts(parameter, None)

    def _optimizer_parts(self, parameter: Any, name: str | None) -> Iterator[tuple[Tensor, int]]:
        """This rank's part of what the optimizer has of a parameter: its fp32 copy (None; at stage
        0 the parameter itself), or a part of its state."""
        optimizer = self._engine.optimizer
        if self.config.zero == 0:
            whole = optimizer.state.get(parameter, {}).get(name) if name else parameter.data
            if whole is not None:
                yield whole.view(-1), 0
        elif self.config.zero == 3:
            part, _ = optimizer._get_fp32_opt_state_partition(parameter, True, name)
            yield part, part.numel() * self.world.rank
        elif parameter._hp_mapping is not None:  # this rank has a part of it
            mapping = parameter._hp_mapping
            yield mapping.get_hp_fragment(name).view(-1), mapping.lp_fragment_address.start

    def save(self, folder: Path, name: str) -> None:
        """Write weights, optimizer and average into folder/name/ (collective)."""
        ours = {} if self._scale is None else {"our_loss_scale": self._scale.state_dict()}
        self._engine.save_checkpoint(str(folder), tag=name, client_state=ours, save_latest=False)
        if self._average is not None:
            self._average.save(self._average_file(folder / name))

    def load(self, folder: Path, name: str) -> None:
        """Read what `save` wrote, by the same number of ranks and the same stage (collective)."""
        path, ours = self._engine.load_checkpoint(str(folder), tag=name)
        if path is None:
            raise UserError(f"{folder / name}: DeepSpeed finds no checkpoint there")
        if self._scale is not None and "our_loss_scale" in ours:  # not of a run in fp32 or bf16
            self._scale.load_state_dict(ours["our_loss_scale"])
            self._give_scale(self._scale.value)
        if self._average is not None:
            file = self._average_file(folder / name)
            if not file.is_file():
                raise UserError(
                    f"{file} is missing: that run kept no average; set optim.ema_half_life=0"
                )
            self._average.load(file)

    def _average_file(self, folder: Path) -> Path:
        return folder / f"average-rank-{self.world.rank:05d}.safetensors"

    @contextmanager
    def evaluated(self) -> Iterator[Any]:
        """The network in eval mode with the weights that count: the averaged ones where they are
        kept, in a copy of the whole model; else the trained network itself (collective)."""
        if self._average is None:
            yield self.module.eval()
            self.module.train()
            return
        state = self._whole_state(wanted=True)
        yield assemble(type(self.module), self.module.config, state).to(self.world.device)

    def full_state(self) -> dict[str, Tensor] | None:
        """All weights and buffers by name, whole, on the CPU; None but on rank 0 (collective).

        The weights are the averaged ones where they are kept.
        """
        state = self._whole_state(wanted=self.world.is_first)
        return state if self.world.is_first else None

    def _whole_state(self, wanted: bool) -> dict[str, Tensor]:
        """The weights that count and the buffers, on the CPU, where they are wanted; empty
        elsewhere (collective).

        One parameter at a time is gathered, so that no rank holds the whole model on its device.
        """
        average = self._average
        state = {}
        with swapped(self.masters(), average.shards) if average is not None else nullcontext():
            for name, parameter in self.module.named_parameters():
                with self._counting(parameter) as whole:
                    if wanted:
                        state[name] = whole.detach().cpu().clone()
        if wanted:
            state |= {name: part.cpu().clone() for name, part in self.module.named_buffers()}
        return state

    @contextmanager
    def _counting(self, parameter: nn.Parameter) -> Iterator[Tensor]:
        """A whole parameter: as the network has it, or, while the average is in the optimizer's
        place, as the optimizer has it."""
        if self._average is not None and self.config.zero > 0:
            yield load_deepspeed().utils.safe_get_full_fp32_param(parameter)
            return
        with self._gathered(parameter):
            yield parameter

    @contextmanager
    def _gathered(self, parameter: nn.Parameter) -> Iterator[None]:
        if self.config.zero == 3:
            with load_deepspeed().zero.GatheredParameters([parameter]):
                yield
        else:
            yield


def write_rows(part: Tensor, first: int, rows: Tensor, values: Tensor) -> None:
    """Write rows [m] of a tensor, values [m,...], into a flat part of it, in place.

    The part starts at element `first` of the whole; what lies outside it is left out.
    """
    rows, values = rows.to(part.device), values.to(part)
    width = values[0].numel()
    at = (rows[:, None] * width + torch.arange(width, device=part.device)).flatten() - first
    inside = (at >= 0) & (at < part.numel())
    part[at[inside]] = values.flatten()[inside]
