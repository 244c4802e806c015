"""Checkpoints of before, in DeepSpeed's own files, which the same ranks and stage can read."""

from pathlib import Path

from taming_dist.errors import UserError

STAGES = {0: "zero0", 1: "zero1 or zero2", 2: "zero1 or zero2", 3: "zero3"}


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
