"""What the user sets of an engine, and DeepSpeed's configuration from it: pure, no import of it."""

import dataclasses
from typing import Any

import torch

from taming_dist.engine.blocks import check_compiler
from taming_dist.engine.tf32 import TF32, TF32_CHOICES
from taming_dist.errors import UserError
from taming_dist.ranges import check_ranges, ranged

PRECISIONS = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
# fp16 is left out: a sum over ranks of gradients that are scaled up to its range leaves it.
REDUCTIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Elements per reduction, and of weights that ZeRO 3 has whole before or after their use.
# DeepSpeed's default of 5e8 is memory that every engine holds up to four times over, many times
# what the networks of this package take; those of ZeRO 3, up to 1e9, keep such networks whole.
BUCKET = 2**24


@dataclasses.dataclass
class EngineConfig:
    """`zero`: ZeRO stage 0 to 3; `precision`: fp32, bf16 or fp16 (autocast; weights stay fp32).

    `tf32` says what GPUs may round to TF32 of what is computed in fp32: `none`, `convolutions` (of
    the networks at precision=fp32; of LPIPS, R1 and the adaptive weight at any) or `all` (matrix
    products as well: linear layers, the codebook's search). `auto` is none at precision=fp32, which
    so means exact fp32, and convolutions at bf16 and fp16, which keep as few bits themselves.

    `reduce`: fp32 or bf16, what gradients are rounded to before they are added up over ranks, at
    any stage and precision.

    `deterministic`: on a GPU too a resumed run equals an undisturbed one to the bit, on the same
    kind of card and with the same torch, at the price of slower operations.

    `offload`: none or optimizer: moments and the fp32 weights that the optimizer moves are on the
    host, whose CPU moves them (arXiv 2101.06840), at stages 1 to 3.

    `fast`: on NVIDIA GPUs bf16 and fp16 take shorter ways where there are such: `runs_lean` and
    `halves_losses`; on CPUs convolutions in fp32 do (`models.convolution`). Without it everything
    is computed as it is written in the models.

    `graphs`: what a network names by `passes` (E and G) is recorded once in CUDA graphs and then
    replayed, at stages 0 to 2; on the CPU it is run the same way, without a graph.

    `persist_below`: at stage 3 parameters of fewer elements stay whole on every rank. `recompute`:
    activation checkpointing of the networks' blocks; `compile`: torch.compile of each of them, of a
    prior as a whole."""

    zero: int = ranged(0, at_least=0, at_most=3)
    precision: str = "fp32"
    tf32: str = "auto"
    reduce: str = "fp32"
    deterministic: bool = False
    fast: bool = True
    offload: str = "none"
    persist_below: int = ranged(100_000, at_least=0)
    recompute: bool = False
    compile: bool = False
    graphs: bool = False

    def __post_init__(self) -> None:
        check_ranges(self, "engine")
        if self.precision not in PRECISIONS:
            raise UserError(f"engine.precision={self.precision}: use fp32, bf16 or fp16")
        if self.tf32 not in ("auto", *TF32_CHOICES):
            raise UserError(f"engine.tf32={self.tf32}: use auto, none, convolutions or all")
        if self.reduce not in REDUCTIONS:
            raise UserError(f"engine.reduce={self.reduce}: use fp32 or bf16")
        if self.offload not in ("none", "optimizer"):
            raise UserError(f"engine.offload={self.offload}: use none or optimizer")
        if self.offload == "optimizer" and self.zero == 0:
            raise UserError("engine.offload=optimizer needs ZeRO: use engine=zero1, zero2 or zero3")
        if self.graphs and (self.zero == 3 or self.compile or self.recompute):
            raise UserError(
                "engine.graphs=true is for ZeRO 0 to 2 without engine.compile and "
                "engine.recompute: leave it out"
            )
        if self.compile:
            check_compiler(torch.cuda.is_available())

    def at_stage(self, zero: int) -> "EngineConfig":
        """Return it at another stage of ZeRO; at 0 nothing is offloaded."""
        return dataclasses.replace(self, zero=zero, offload=self.offload if zero else "none")

    def runs_lean(self, device: torch.device) -> bool:
        """Whether networks that can are run by kernels of our own (`models.lean`): whole ones, as
        their layers are not called, and neither compiled nor recomputed layer by layer."""
        piecewise = self.zero == 3 or self.compile or self.recompute
        return self._is_fast(device) and self.precision != "fp32" and not piecewise

    def halves_losses(self, device: torch.device) -> bool:
        """Whether LPIPS is computed in fp16 and the adaptive weight in bf16. At fp16 not: the
        engine's own loss scale would come on top of that of LPIPS."""
        return self._is_fast(device) and self.precision == "bf16"

    def _is_fast(self, device: torch.device) -> bool:
        return self.fast and device.type == "cuda"

    @property
    def allowed_tf32(self) -> TF32:
        """What `tf32` stands for."""
        if self.tf32 == "auto":
            return TF32_CHOICES["none" if self.precision == "fp32" else "convolutions"]
        return TF32_CHOICES[self.tf32]


def deepspeed_config(
    engine: EngineConfig, micro_batch: int, accumulation: int, overlap: bool
) -> dict[str, Any]:
    """DeepSpeed's configuration of one engine: a pure function, everything stated explicitly.

    `overlap`: reductions run beside the backward pass, at the price of one wait for the device in
    each (at ZeRO 1 and 2 in `independent_gradient_partition_epilogue`).
    """
    zero: dict[str, Any] = {"stage": engine.zero, "reduce_bucket_size": BUCKET}
    if engine.zero > 0:
        zero |= {"contiguous_gradients": True, "overlap_comm": overlap}
    if engine.zero == 3:
        zero |= {"stage3_param_persistence_threshold": engine.persist_below}
        kept = ("prefetch_bucket_size", "max_reuse_distance", "max_live_parameters")
        zero |= {f"stage3_{name}": BUCKET for name in kept}
    if engine.offload == "optimizer":
        zero |= {"offload_optimizer": {"device": "cpu", "pin_memory": True}}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0,  # its default is 1; the engine clips
        "zero_optimization": zero,
        "communication_data_type": engine.reduce,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # which would be compiled; torch's is fused, too
        "steps_per_print": 2**31,
        "wall_clock_breakdown": False,
        "timers": {"throughput": {"enabled": False}},  # it waits for the device in every step
    }
    dtype = PRECISIONS[engine.precision]
    if dtype is not None:
        # Gradients of the modules named here, and at ZeRO 3 their weights, would go between ranks
        # in the precision of autocast: also where a weight is used in fp32.
        config["torch_autocast"] = {
            "enabled": True,
            "dtype": str(dtype).removeprefix("torch."),
            "lower_precision_safe_modules": [],
        }
    return config
