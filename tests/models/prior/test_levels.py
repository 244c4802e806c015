"""Several codes at each place of the grid: all of them are tokens, one place after the other."""

from typing import Any

import pytest
import torch

from taming_dist.generation.completion import Known, first_codes, masked_picture
from taming_dist.generation.generator import generate_codes
from taming_dist.generation.sampling import Sampling
from taming_dist.models.prior.conditions import ClassCondition
from taming_dist.models.prior.orders import ORDERS, arrange, places_of, restore
from taming_dist.models.prior.prefix import Prefix
from taming_dist.models.prior.transformer import Transformer, TransformerConfig

SHAPE, COUNT = (3, 2, 4), 24
PREFIX = Prefix((torch.tensor([[1], [2]]),))
TOKENS = torch.randint(9, (2, COUNT), generator=torch.Generator().manual_seed(2))
BLOCKS = pytest.mark.parametrize("block", ["gpt", "llama", "rar"])


def tiny(shape: tuple[int, ...] = SHAPE, **settings: Any) -> Transformer:
    """A transformer with logits far from flat, so that a wrong position shows."""
    sizes: dict[str, Any] = {"layers": 2, "heads": 2, "width": 16, "condition_table": "own"}
    config = TransformerConfig(
        9, list(shape), condition=ClassCondition(3), **sizes | {"order": "raster"} | settings
    )
    model = Transformer(config)
    randomness = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=randomness) * 0.3)
    return model.eval()


@pytest.mark.parametrize("order", ORDERS)
def test_all_levels_of_a_place_stand_before_the_next_place(order: str) -> None:
    places = ORDERS[order]().places((2, 4))
    codes = torch.arange(2 * COUNT).view(2, *SHAPE)
    tokens = arrange(codes, places)
    slow = [codes[1, level, p // 4, p % 4] for p in places.tolist() for level in range(3)]
    assert tokens[1].tolist() == slow
    assert torch.equal(restore(tokens, SHAPE, places), codes)
    each = torch.stack([places, places.flip(0)])  # an order for each image
    assert torch.equal(arrange(codes, each)[0], tokens[0])
    assert torch.equal(restore(arrange(codes, each), SHAPE, each), codes)


def test_a_sequence_is_one_row() -> None:
    codes = torch.arange(2 * 7).view(2, 7)
    places = ORDERS["raster"]().places((1, 7))
    assert torch.equal(arrange(codes, places), codes)
    assert torch.equal(restore(codes, (7,), places), codes)


@pytest.mark.parametrize("order", ["raster", "z_curve", "rar"])
@BLOCKS
@torch.no_grad()
def test_decoding_with_the_cache_equals_the_full_pass(block: str, order: str) -> None:
    model = tiny(block=block, order=order)
    first, cache = model.begin(PREFIX)
    steps = [first] + [model.step(TOKENS[:, k : k + 1], cache) for k in range(COUNT - 1)]
    torch.testing.assert_close(torch.stack(steps, 1), model(TOKENS, PREFIX), atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_a_block_without_learned_positions_is_told_the_level_and_the_place_of_each_token() -> None:
    model, read = tiny(block="llama", order="z_curve"), []
    model.blocks[0].register_forward_pre_hook(lambda _, args: read.append(args))
    model(TOKENS, PREFIX)
    x, around = read[0]
    for token in range(COUNT - 1):
        expected = model.tok_emb.weight[TOKENS[:, token]] + model.level_emb[token % 3]
        torch.testing.assert_close(x[:, 1 + token], expected)
        place = int(model.places[token // 3])
        alone = model.config.block_type.rotation(
            model.config.block_sizes, model.config.block, torch.tensor([place])
        )
        torch.testing.assert_close(around.rotation[1 + token], alone[0])
    assert tiny((2, 4), block="llama").level_emb is None
    assert tiny(block="gpt").level_emb is None  # its positions say it


@torch.no_grad()
def test_in_a_drawn_order_all_is_told_by_place_and_level() -> None:
    model, read = tiny(block="gpt", order="rar"), []
    drawn = torch.rand(2, 8, generator=torch.Generator().manual_seed(3))
    places = places_of(drawn)
    model.blocks[0].register_forward_pre_hook(lambda _, args: read.append(args[0]))
    model(TOKENS, PREFIX, places)
    for image in range(2):
        for token in range(COUNT - 2):
            spot = 3 * int(places[image, token // 3]) + token % 3
            after = 3 * int(places[image, (token + 1) // 3]) + (token + 1) % 3
            expected = model.tok_emb.weight[TOKENS[image, token]] + model.pos_emb[0, 1 + spot]
            expected = expected + model.target_emb[after]
            torch.testing.assert_close(read[0][image, 1 + token], expected)


@pytest.mark.parametrize("shape", [SHAPE, (7,)])
@pytest.mark.parametrize("scheme", ["next_index", "masked"])
def test_both_schemes_write_codes_of_the_shape_around_known_ones(
    scheme: str, shape: tuple[int, ...]
) -> None:
    model = tiny(shape, scheme=scheme)
    drawn = generate_codes(model, PREFIX, Sampling(), 5, range(2))
    assert drawn.shape == (2, *shape)
    assert int(drawn.max()) < 9
    mask = first_codes(4, shape, model.places)
    assert int(mask.sum()) == 4
    again = generate_codes(model, PREFIX, Sampling(), 6, range(2), Known(drawn, mask))
    assert torch.equal(again[:, mask], drawn[:, mask])
    assert not torch.equal(again, drawn)


def test_a_mask_of_places_is_that_of_all_their_levels() -> None:
    codes = torch.arange(2 * COUNT).view(2, *SHAPE) % 9
    mask = torch.zeros(2, 4, dtype=torch.bool)
    mask[0] = True
    known = Known(codes, mask)
    assert torch.equal(known.mask, mask.expand(codes.shape))
    tokens = known.tokens(ORDERS["raster"](), torch.device("cpu"))
    assert tokens.leading == 12
    partly = known.mask[0].clone()
    partly[2, 0, 1] = False  # one level is missing there
    shown = masked_picture(torch.ones(3, 4, 8), partly)
    assert (shown[0, :2] == 1).all(0).tolist() == [True, True, False, False] + [True] * 4
    assert (shown[0, 2:] < 1).all()
