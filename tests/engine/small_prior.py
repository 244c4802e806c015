"""A small stage 2 of every kind, and its data: for the workers of these tests and of tests/gpu."""

from collections.abc import Iterator
from typing import Any

import torch
from small_stage import global_batch

from taming_dist.data.codes import CodeBatch
from taming_dist.models.prior.conditions import ClassCondition, CodesCondition
from taming_dist.models.prior.schemes import NextIndex
from taming_dist.models.prior.transformer import TransformerConfig
from taming_dist.stages.context import Context
from taming_dist.stages.prior import TokenLossConfig, TransformerRecipe

VOCABULARY, CLASSES, GRID = 24, 3, (3, 4)
SECOND_VOCABULARY, SECOND_GRID = 30, (2, 2)  # of the condition's codes: more than those of images
NOISY, BY_CLASS = NextIndex(pkeep=0.8), ClassCondition(CLASSES)
OWN = {"condition_table": "own"}
# What each kind has beside sizes, and the share of conditions that it drops
KINDS: dict[str, tuple[dict[str, Any], float]] = {
    "gpt": ({"scheme": NOISY, "condition": BY_CLASS}, 0.0),
    "llama": ({"scheme": NOISY, "condition": BY_CLASS, "block": "llama", **OWN}, 0.3),
    "rar": ({"scheme": NOISY, "condition": BY_CLASS, "block": "rar", "order": "rar"}, 0.3),
    "masked": ({"scheme": "masked", "condition": BY_CLASS, **OWN}, 0.3),
    "codes": ({"condition": CodesCondition(SECOND_VOCABULARY, list(SECOND_GRID)), **OWN}, 0.3),
}


def small_prior(kind: str, context: Context, **sizes: Any) -> TransformerRecipe:
    """Stage 2 of a kind, of two layers unless `sizes` says otherwise."""
    parts, dropout = KINDS[kind]
    sizes = {"layers": 2, "heads": 2, "width": 16, "null_prefix": dropout > 0} | sizes
    model = TransformerConfig(VOCABULARY, list(GRID), **sizes, **parts)
    return TransformerRecipe(model, TokenLossConfig(condition_dropout=dropout), context)


def code_batches(recipe: TransformerRecipe, step: int) -> Iterator[CodeBatch]:
    """What `image_batches` is to stage 1; every batch has the columns of all conditions."""
    context, world = recipe.context, recipe.world
    count, randomness = global_batch(context), torch.Generator().manual_seed(step)
    shape = recipe.network.config.code_shape
    columns = {
        "codes": torch.randint(VOCABULARY, (count, *shape), generator=randomness),
        "cls": torch.randint(CLASSES, (count,), generator=randomness),
        "cond": torch.randint(SECOND_VOCABULARY, (count, *SECOND_GRID), generator=randomness),
    }
    for rows in torch.arange(count).chunk(context.accumulation):
        mine = rows[world.rank :: world.world_size]
        yield CodeBatch({name: column[mine] for name, column in columns.items()}, mine)
