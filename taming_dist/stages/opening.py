"""How stages open what a run needs: readers as the loop takes them, and weights to start from."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from taming_dist.data.batching import BatchSizes
from taming_dist.errors import UserError
from taming_dist.models.answers import other_answers
from taming_dist.models.discriminators import build_discriminator
from taming_dist.models.export import Exported, ModelConfig
from taming_dist.placeholders import refuse_placeholder
from taming_dist.training.export import DISCRIMINATOR_FILE, check_tensors
from taming_dist.training.run import Data, EvaluatedSource, Source


def join(
    train: Source,
    val: EvaluatedSource,
    shown: EvaluatedSource,
    batch: BatchSizes,
    unread: Sequence[dict[str, Any]] = (),
) -> Data:
    """The readers as the loop takes them, with as many validation batches on every rank; `unread`
    are the samples that `shown` cannot read."""
    samples = val.plan.num_evaluated
    if samples < batch.world_size:
        key = "data.val" if samples == val.plan.num_samples else "train.validate_images"
        raise UserError(
            f"{key} gives {samples} samples for {batch.world_size} ranks: give each rank at least "
            f"one"
        )
    train.plan.check_start(0)  # refuses lanes that do not fit, before any process group starts
    val_batches = math.ceil(math.ceil(samples / batch.world_size) / batch.micro_batch)
    preview = next(shown.epoch_batches(), None)
    if preview is None:
        raise UserError(
            f"data.val: none of its {val.plan.num_samples} samples can be read; the first, "
            f"{unread[0]['key']} in {unread[0]['shard']}: {unread[0]['error']}"
        )
    return Data(train, val, val_batches, preview, batch.accumulation)


def initial_weights(
    init: str, kind: type[Exported], model: ModelConfig, same_codes: bool = False
) -> dict[str, Tensor] | None:
    """The tensors of the export `init` (run.init), checked against the model that is to start from
    them; None without one. Those that a run may add (`Exported.additions`) may be missing, and
    those that it goes by (`Exported.steering`) are as this run has them. `same_codes`: codes of the
    export are to be this run's, too, and their fingerprint goes by all that is said of the model.

    Raises:
        UserError: it is no export of this kind, or of another model.
    """
    if not init:
        return None
    try:
        found = kind.from_pretrained(init)
    except UserError as error:
        raise UserError(f"run.init: {error}") from error
    for key, theirs, ours in other_answers(found.config, model, every=same_codes):
        stays = "; with train.freeze=[encoder,quantizer] codes keep their fingerprint only so"
        raise UserError(
            f"run.init={init} has {key}={theirs} and this run {ours}: set it so, or start from "
            f"another export{stays if same_codes else ''}"
        )
    state = found.state_dict()
    with torch.device("meta"):
        expected = kind(model).state_dict()
    for name, setting in kind.additions.items():
        if name in state and name not in expected:
            raise UserError(f"run.init={init} has {name}, which this run lacks: set {setting}")
        if name not in state:
            expected.pop(name, None)
    for name in kind.steering:
        if name not in expected:
            state.pop(name, None)
        elif name not in state:
            state[name] = torch.ones_like(expected[name], device="cpu")
    check_tensors(expected, state, f"run.init={init}")
    return state


def discriminator_weights(init: str, config: Any, channels: int) -> dict[str, Tensor] | None:
    """The tensors of a discriminator that was kept beside the VQGAN of `init`, if there is one and
    the run trains one (`config` is loss.discriminator), checked against it.

    Raises:
        UserError: it is damaged, or of another kind.
    """
    path = Path(init) / DISCRIMINATOR_FILE
    if not init or config is None or not path.is_file():
        return None
    refuse_placeholder(path, "the weights of a discriminator")
    try:
        state = load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} is damaged ({error}): import the checkpoint again") from error
    with torch.device("meta"):
        network = build_discriminator(config, channels)
    source = f"loss.discriminator is not of the kind of {path} (remove it to start anew), which"
    check_tensors(network.state_dict(), state, source)
    return state
