"""Checkpoints of before, in DeepSpeed's own files, which the same ranks and stage can read."""

from pathlib import Path
from typing import Any

from taming_dist.errors import UserError
from taming_dist.models.joined import stored_parameters

STAGES = {0: "zero0", 1: "zero1 or zero2", 2: "zero1 or zero2", 3: "zero3"}

SETTINGS = ("betas", "weight_decay", "fused")  # of an optimizer's group, beside the scheduled lr


def load_former(engine: Any, folder: Path, name: str, zero: int) -> dict[str, Any]:
    """Have DeepSpeed's engine read its files in folder/name; gives what ours had added to them.

    Betas and weight decay stay as they are.
    """
    check_former(folder / name, zero)
    if any(stored.parts > 1 for stored in stored_parameters(engine.module)):
        raise UserError(
            f"{folder / name} is of a version that computed this network's layers apart: resume "
            f"once with the version that wrote it and save with a later one, or start from its "
            f"export (run.init)"
        )
    groups = engine.optimizer.param_groups
    kept = [{key: group[key] for key in SETTINGS} for group in groups]
    _, ours = engine.load_checkpoint(str(folder), tag=name)
    for group, settings in zip(engine.optimizer.param_groups, kept, strict=True):
        group.update(settings)
    return ours


def former_average(folder: Path, part: int) -> Path:
    """The file of a part of the average of the weights.

    Raises:
        UserError: there is none.
    """
    file = folder / f"average-rank-{part:05d}.safetensors"
    if not file.is_file():
        raise UserError(f"{file} is missing: that run kept no average; set optim.ema_half_life=0")
    return file


def check_former(folder: Path, zero: int) -> None:
    """Raise a UserError if an engine's files of a checkpoint of before are of another ZeRO stage
    than `zero`, or are none at all."""
    if not any(folder.glob("*_states.pt")):
        raise UserError(f"{folder} has neither our tensors nor those of a former version")
    wrote = 0
    if any(folder.glob("zero_pp_rank_*_model_states.pt")):
        wrote = 3
    elif any(folder.glob("*zero_pp_rank_*_optim_states.pt")):
        wrote = 2
    if STAGES[wrote] != STAGES[zero]:
        raise UserError(
            f"{folder} was written by a former version with engine={STAGES[wrote]}: resume once "
            f"with that; what it saves any stage can read"
        )
