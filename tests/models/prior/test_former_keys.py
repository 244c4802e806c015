"""Exports and runs of before the parts of a transformer had configs of their own."""

import json
from pathlib import Path
from typing import Any

import pytest

from taming_dist.models.prior.conditions import ClassCondition, CodesCondition, Unconditional
from taming_dist.models.prior.schemes import NextIndex
from taming_dist.models.prior.transformer import Transformer, TransformerConfig

FORMER: dict[str, Any] = {  # config.json as it was, for the condition `none`
    "block_size": 0,
    "classes": 0,
    "condition": "none",
    "condition_fingerprint": "",
    "condition_grid": [],
    "condition_vocabulary": 0,
    "dropout_attention": 0.0,
    "dropout_embedding": 0.0,
    "dropout_residual": 0.0,
    "grid": [2, 2],
    "heads": 1,
    "kind": "transformer",
    "layers": 1,
    "vocabulary": 24,
    "vqgan_fingerprint": "abc",
    "width": 8,
}
SIZES: dict[str, Any] = {"layers": 1, "heads": 1, "width": 8, "vqgan_fingerprint": "abc"}
CASES: list[tuple[Any, dict[str, Any]]] = [
    (Unconditional(), {}),
    (ClassCondition(7), {"condition": "class", "classes": 7}),
    (
        CodesCondition(9, [1, 3], "def"),
        {
            "condition": "codes",
            "condition_vocabulary": 9,
            "condition_grid": [1, 3],
            "condition_fingerprint": "def",
        },
    ),
]


@pytest.mark.parametrize(("condition", "keys"), CASES, ids=["none", "class", "codes"])
def test_exports_of_what_there_was_keep_their_config_and_are_read_from_it(
    condition: Any, keys: dict[str, Any], tmp_path: Path
) -> None:
    noisy = NextIndex(pkeep=0.9)  # changes no answer, and was no key of a model
    config = TransformerConfig(24, [2, 2], condition=condition, scheme=noisy, **SIZES)
    model = Transformer(config)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == FORMER | keys
    again = Transformer.from_pretrained(tmp_path)
    assert again.config.condition == condition
    assert again.config.scheme == NextIndex()
    assert again.fingerprint == model.fingerprint


def test_what_is_newer_is_read_as_it_is() -> None:
    values = {"vocabulary": 24, "grid": [2, 2], "condition": {"name": "class", "classes": 7}}
    config = TransformerConfig(**TransformerConfig.present(values))
    assert config.condition == ClassCondition(7)
