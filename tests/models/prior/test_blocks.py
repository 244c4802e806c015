"""Blocks: what the transformer leaves to a kind of block, told by one with positions of its own."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from taming_dist.models.prior.blocks import BLOCKS, Around, Block, BlockSizes
from taming_dist.models.prior.transformer import BLOCK_CONFIGS, Transformer, TransformerConfig


@dataclass
class ToyBlockConfig:
    """Rotates queries and keys by their position."""

    base: float = 100.0
    name: str = "toy"


class ToyBlock(Block):
    """One head that two queries share, rotary positions, RMSNorm."""

    learned_positions = False

    def __init__(self, sizes: BlockSizes, config: ToyBlockConfig) -> None:
        super().__init__()
        self.width = sizes.width // sizes.heads
        self.cached = (1, self.width)
        self.base, self.heads = config.base, sizes.heads
        self.norm = nn.RMSNorm(sizes.width)
        self.query = nn.Linear(sizes.width, sizes.width, bias=False)
        self.pair = nn.Linear(sizes.width, 2 * self.width, bias=False)

    def forward(self, x: Tensor, around: Around) -> Tensor:
        start = 0 if around.cache is None else around.cache.length
        places = torch.arange(start, start + x.shape[1], device=x.device)
        query = self.query(self.norm(x)).unflatten(2, (self.heads, -1)).transpose(1, 2)
        key, value = self.pair(self.norm(x)).unsqueeze(1).chunk(2, dim=-1)
        query, key = self.rotated(query, places), self.rotated(key, places)
        if around.cache is not None:
            key, value = around.cache.extend(around.layer, key, value)
        weights = (query @ key.transpose(2, 3)).masked_fill(
            torch.arange(key.shape[2]) > places[:, None], -torch.inf
        )
        return x + (weights.softmax(-1) @ value).transpose(1, 2).flatten(2)

    def rotated(self, x: Tensor, places: Tensor) -> Tensor:
        angles = places[:, None] / self.base ** (torch.arange(self.width // 2) / self.width)
        one, other = x.chunk(2, dim=-1)
        return torch.cat(
            [one * angles.cos() - other * angles.sin(), one * angles.sin() + other * angles.cos()],
            dim=-1,
        )

    @classmethod
    def last_norm(cls, sizes: BlockSizes, config: ToyBlockConfig) -> nn.Module:
        return nn.RMSNorm(sizes.width)


@pytest.fixture
def toy(monkeypatch: pytest.MonkeyPatch) -> Transformer:
    monkeypatch.setitem(BLOCKS, "toy", (ToyBlockConfig, ToyBlock))
    monkeypatch.setitem(BLOCK_CONFIGS, "toy", ToyBlockConfig)
    config = TransformerConfig(24, [3, 4], layers=2, heads=2, width=16, block="toy")
    model = Transformer(config)
    randomness = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=randomness) * 0.3)
    return model.eval()


def test_a_block_may_bring_positions_norm_and_heads_of_its_own(toy: Transformer) -> None:
    assert toy.pos_emb is None
    assert isinstance(toy.ln_f, nn.RMSNorm)
    _, cache = toy.begin(toy.condition.prefix(3, {}))
    assert cache.keys.shape == (2, 3, 1, 12, 8)
    assert isinstance(toy.blocks[0], toy.block_types)


def test_it_decodes_with_the_cache_what_the_full_pass_gives(toy: Transformer) -> None:
    tokens = torch.randint(24, (3, 12), generator=torch.Generator().manual_seed(2))
    prefix = toy.condition.prefix(3, {})
    with torch.no_grad():
        full = toy(tokens, prefix)
        first, cache = toy.begin(prefix)
        steps = [first]
        steps += [toy.step(tokens[:, k : k + 1], cache) for k in range(11)]
        swapped = toy(tokens[:, [1, 0, *range(2, 12)]], prefix)
    assert torch.allclose(torch.stack(steps, dim=1), full, atol=1e-5)
    assert not torch.allclose(swapped[:, -1], full[:, -1], atol=1e-3)  # positions count


def test_its_export_says_which_block_it_has(toy: Transformer) -> None:
    written = toy.canonical_config()
    assert written["block"] == {"name": "toy", "base": 100.0}
    again = TransformerConfig.present({name: written[name] for name in written if name != "kind"})
    assert TransformerConfig(**again) == toy.config
