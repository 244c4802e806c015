"""DeepSpeed's configuration as a table: everything that its defaults would decide is stated."""

from typing import Any

import pytest
import torch

from taming_dist.engine.settings import BUCKET, EngineConfig, deepspeed_config
from taming_dist.errors import UserError

EXPECTED: list[tuple[dict[str, Any], bool, dict[str, Any], dict[str, Any] | None]] = [
    # engine, overlapping, zero_optimization, torch_autocast
    ({"zero": 0}, False, {"stage": 0}, None),
    ({"zero": 1}, False, {"stage": 1, "contiguous_gradients": True, "overlap_comm": False}, None),
    (
        {"zero": 2, "precision": "bf16", "reduce": "bf16"},
        True,
        {"stage": 2, "contiguous_gradients": True, "overlap_comm": True},
        {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []},
    ),
    (
        {"zero": 1, "offload": "optimizer"},
        False,
        {
            "stage": 1,
            "contiguous_gradients": True,
            "overlap_comm": False,
            "offload_optimizer": {"device": "cpu", "pin_memory": True},
        },
        None,
    ),
    (
        {"zero": 3, "persist_below": 7},
        False,
        {
            "stage": 3,
            "contiguous_gradients": True,
            "overlap_comm": False,
            "stage3_param_persistence_threshold": 7,
            "stage3_prefetch_bucket_size": BUCKET,  # its defaults keep whole what is below 1e9
            "stage3_max_reuse_distance": BUCKET,
            "stage3_max_live_parameters": BUCKET,
        },
        None,
    ),
]


@pytest.mark.parametrize(("engine", "overlap", "zero", "autocast"), EXPECTED)
def test_every_stage_is_configured_as_the_table_says(
    engine: dict[str, Any],
    overlap: bool,
    zero: dict[str, Any],
    autocast: dict[str, Any] | None,
) -> None:
    found = deepspeed_config(EngineConfig(**engine), 3, 5, overlap)
    # its default is 5e8 elements, held up to four times over
    assert found["zero_optimization"].pop("reduce_bucket_size") == BUCKET
    assert found["zero_optimization"] == zero
    assert found.get("torch_autocast") == autocast
    assert found["communication_data_type"] == EngineConfig(**engine).reduce
    assert found["gradient_clipping"] == 0.0  # left out, DeepSpeed would clip to norm 1
    assert found["timers"] == {"throughput": {"enabled": False}}  # left out, it would wait
    assert found["train_micro_batch_size_per_gpu"] == 3
    assert found["gradient_accumulation_steps"] == 5
    assert not {"fp16", "bf16", "optimizer", "scheduler"} & found.keys()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"zero": 4}, r"engine\.zero=4: use a whole number from 0 to 3"),
        ({"zero": 1, "offload": "all"}, r"engine\.offload=all: use none or optimizer"),
        ({"offload": "optimizer"}, r"engine\.offload=optimizer .* engine=zero1, zero2 or zero3"),
        ({"precision": "half"}, r"engine\.precision=half: use fp32, bf16 or fp16"),
        ({"reduce": "fp16"}, r"engine\.reduce=fp16: use fp32 or bf16"),
    ],
)
def test_values_that_do_not_exist_are_the_users_mistake(
    values: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        EngineConfig(**values)


@pytest.mark.parametrize(
    ("settings", "device", "lean", "halves"),
    [
        ({"precision": "bf16"}, "cuda", True, True),
        ({"precision": "bf16", "zero": 2}, "cuda", True, True),
        ({"precision": "fp16"}, "cuda", True, False),
        ({"precision": "bf16", "zero": 3}, "cuda", False, True),
        ({"precision": "bf16", "compile": True}, "cuda", False, True),
        ({"precision": "bf16", "recompute": True}, "cuda", False, True),
        ({"precision": "bf16", "fast": False}, "cuda", False, False),
        ({"precision": "fp32"}, "cuda", False, False),
        ({"precision": "bf16"}, "cpu", False, False),
    ],
)
def test_shorter_ways_are_for_low_precision_on_gpus(
    settings: dict[str, Any], device: str, lean: bool, halves: bool
) -> None:
    config = EngineConfig(**settings)
    assert config.runs_lean(torch.device(device)) == lean
    assert config.halves_losses(torch.device(device)) == halves
