"""The transformer in orders that are drawn: what it is told of places, against a slow version, and
that nothing else than places tells its tokens apart."""

from typing import Any

import pytest
import torch
from torch import Tensor

from taming_dist.generation.generator import generate_codes
from taming_dist.generation.sampling import Sampling
from taming_dist.models.prior.conditions import CodesCondition
from taming_dist.models.prior.orders import ORDERS, RandomToRaster, arrange, places_of
from taming_dist.models.prior.prefix import Prefix
from taming_dist.models.prior.transformer import Transformer, TransformerConfig

PREFIX = Prefix((torch.tensor([[1, 0, 6], [2, 2, 5]]),))
TOKENS = torch.randint(24, (2, 12), generator=torch.Generator().manual_seed(2))
BLOCKS = pytest.mark.parametrize("block", ["gpt", "llama", "rar"])


def tiny(order: str = "rar", **settings: Any) -> Transformer:
    """A transformer with logits far from flat, so that a wrong position shows."""
    sizes: dict[str, Any] = {"layers": 2, "heads": 2, "width": 16, "condition_table": "own"}
    condition = CodesCondition(7, [1, 3])
    model = Transformer(
        TransformerConfig(24, [3, 4], condition=condition, order=order, **sizes, **settings)
    )
    randomness = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=randomness) * 0.3)
    return model.eval()


def random_places() -> Tensor:
    drawn = RandomToRaster().draw(2, (3, 4), 0.0, torch.Generator().manual_seed(3))
    assert drawn is not None
    return places_of(drawn)


@torch.no_grad()
def test_positions_are_told_their_place_and_that_of_the_token_they_predict() -> None:
    model, places = tiny(block="gpt"), random_places()
    read: list[Tensor] = []
    model.blocks[0].register_forward_pre_hook(lambda _, args: read.append(args[0]))
    model(TOKENS, PREFIX, places)
    for image in range(2):
        for position in range(3 + 11):
            token = position - 3
            if token < 0:
                expected = model.cond_emb.weight[PREFIX.parts[0][image, position]]
                expected = expected + model.pos_emb[0, position]
            else:
                place = int(places[image, token])
                expected = model.tok_emb.weight[TOKENS[image, token]]
                expected = expected + model.pos_emb[0, 3 + place]
            if token + 1 >= 0:
                expected = expected + model.target_emb[places[image, token + 1]]
            torch.testing.assert_close(read[0][image, position], expected)


@BLOCKS
@torch.no_grad()
def test_each_image_has_its_own_order_whatever_that_of_the_others(block: str) -> None:
    model, places = tiny(block=block), random_places()
    both = model(TOKENS, PREFIX, places)
    for image in range(2):
        rows = slice(image, image + 1)
        alone = model(TOKENS[rows], PREFIX.rows(rows), places[image])
        torch.testing.assert_close(both[rows], alone, atol=1e-5, rtol=1e-5)
    assert (both - model(TOKENS, PREFIX)).abs().max() > 0.1


@BLOCKS
@torch.no_grad()
def test_decoding_with_the_cache_equals_the_full_pass_in_the_order_of_sampling(block: str) -> None:
    model = tiny(block=block)
    first, cache = model.begin(PREFIX)
    steps = [first] + [model.step(TOKENS[:, k : k + 1], cache) for k in range(11)]
    torch.testing.assert_close(torch.stack(steps, 1), model(TOKENS, PREFIX), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("order", sorted(ORDERS))
@torch.no_grad()
def test_an_image_is_sampled_in_the_models_order_and_its_codes_are_row_by_row(order: str) -> None:
    model = tiny(order)
    codes = generate_codes(model, PREFIX, Sampling(temperature=0), 0, range(2))
    tokens = arrange(codes, ORDERS[order]().places((3, 4)))
    assert torch.equal(model(tokens, PREFIX).argmax(-1), tokens)


@BLOCKS
@torch.no_grad()
def test_where_attention_reads_both_ways_tokens_in_another_order_have_the_same_logits(
    block: str,
) -> None:
    model, places = tiny(block=block, scheme="masked"), random_places()
    expected = model(TOKENS, PREFIX).gather(1, places[..., None].expand(-1, -1, 24))
    found = model(TOKENS.gather(1, places), PREFIX, places)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
