"""Blocks: each kind by gradients, with and without a cache, its parts beside slow, obvious ones;
and what the transformer leaves to a kind, told by one with positions of its own."""

from dataclasses import dataclass
from itertools import product
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from taming_dist.errors import UserError
from taming_dist.kernels import attention_cpu
from taming_dist.models.prior.blocks import (
    BLOCKS,
    Around,
    Block,
    BlockSizes,
    GPTBlockConfig,
    LlamaBlockConfig,
    RARBlockConfig,
)
from taming_dist.models.prior.blocks.attention import attend
from taming_dist.models.prior.blocks.llama import SwiGLU
from taming_dist.models.prior.blocks.rotary import rotated, rotations
from taming_dist.models.prior.conditions import (
    ClassCondition,
    CodesCondition,
    CoordinatesCondition,
    ObjectsCondition,
    SeveralConditions,
    Unconditional,
)
from taming_dist.models.prior.prefix import Prefix
from taming_dist.models.prior.transformer import Transformer, TransformerConfig, decay_groups
from taming_dist.models.quick import run_plainly

KINDS = {
    "gpt": GPTBlockConfig(),
    "gpt with an unmasked prefix": GPTBlockConfig(unmasked=2),
    "llama": LlamaBlockConfig(),
    "llama without norms of queries": LlamaBlockConfig(qk_norm=False),
    "llama with adaptive norms": LlamaBlockConfig(adaptive=True),
    "rar": RARBlockConfig(),
}
CONDITIONS = {
    "none": Unconditional(),
    "class": ClassCondition(5),
    "codes": CodesCondition(7, [2, 2]),
    "coordinates": CoordinatesCondition(8, grid=[2, 2], factor=4, vocabulary=8),
    "objects": ObjectsCondition(categories=3, vocabulary=30, objects=2),
    "several": SeveralConditions([ClassCondition(5), CodesCondition(7, [2, 2])]),
}
each_kind = pytest.mark.parametrize("kind", KINDS)


def tiny(**settings: Any) -> Transformer:
    """A transformer with logits far from flat, so that a wrong mask or position shows."""
    sizes = {"vocabulary": 24, "grid": [3, 4], "layers": 2, "heads": 2, "width": 16}
    model = Transformer(TransformerConfig(**{**sizes, "condition_table": "own", **settings}))
    randomness = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=randomness) * 0.3)
    return model.eval()


def some_tokens(count: int = 3, length: int = 12) -> Tensor:
    return torch.randint(24, (count, length), generator=torch.Generator().manual_seed(2))


def some_prefix(model: Transformer, count: int = 3) -> Prefix:
    parts = []
    for each in model.condition.conditions:
        numbers = torch.arange(count * each.length).view(count, each.length)
        parts.append(numbers % each.vocabulary)
    return Prefix(tuple(parts))


def decoded(model: Transformer, tokens: Tensor, prefix: Prefix) -> Tensor:
    """The logits [b, n, v] of one step after the other."""
    first, cache = model.begin(prefix)
    steps = [first]
    steps += [model.step(tokens[:, k : k + 1], cache) for k in range(tokens.shape[1] - 1)]
    return torch.stack(steps, dim=1)


@each_kind
@pytest.mark.parametrize("scheme", ["next_index", "masked"])
def test_positions_see_those_before_them_or_all_as_the_scheme_says(kind: str, scheme: str) -> None:
    """With the next index only the positions of an unmasked prefix see later ones; no logit depends
    on the token that it predicts."""
    model = tiny(block=KINDS[kind], condition=CodesCondition(7, [1, 3]), scheme=scheme)
    read: list[Tensor] = []
    model.blocks[0].register_forward_pre_hook(lambda _, args: read.append(args[0]))
    written: list[Tensor] = []
    model.blocks[-1].register_forward_hook(lambda *call: written.append(call[-1]))
    model(some_tokens(1), some_prefix(model, 1))
    unmasked, count = getattr(KINDS[kind], "unmasked", 0), read[0].shape[1]
    assert count == (14 if scheme == "next_index" else 15)
    for position in range(count):
        (reached,) = torch.autograd.grad(
            written[0][0, position].square().sum(), read, retain_graph=True
        )
        seen = max(position + 1, unmasked if position < unmasked else 0)
        seen = count if scheme == "masked" else seen
        assert (reached[0].abs().amax(dim=-1) > 0).tolist() == [p < seen for p in range(count)]


@pytest.mark.parametrize(
    ("kind", "condition"),
    [
        (kind, condition)
        for kind, condition in product(KINDS, CONDITIONS)
        if getattr(KINDS[kind], "unmasked", 0) <= CONDITIONS[condition].length
    ],
)
def test_decoding_with_the_cache_equals_the_full_pass(kind: str, condition: str) -> None:
    """Of images with their condition, and with the null prefix."""
    can_drop = CONDITIONS[condition].can_drop
    model = tiny(block=KINDS[kind], condition=CONDITIONS[condition], null_prefix=can_drop)
    prefix, tokens = some_prefix(model), some_tokens()
    if can_drop:
        prefix = prefix.dropping(torch.tensor([False, True, False]))
    with torch.no_grad():
        full = model(tokens, prefix)
        assert torch.allclose(decoded(model, tokens, prefix), full, atol=1e-4)
        swapped = model(tokens[:, [1, 0, *range(2, 12)]], prefix)
    assert not torch.allclose(swapped[:, -1], full[:, -1], atol=1e-3)  # positions count


@each_kind
def test_in_bf16_it_decodes_the_same_up_to_rounding(kind: str) -> None:
    model = tiny(block=KINDS[kind], condition=CodesCondition(7, [2, 2]))
    prefix, tokens = some_prefix(model), some_tokens()
    with torch.no_grad():
        exact = model(tokens, prefix)
        with torch.autocast("cpu", torch.bfloat16):
            full, steps = model(tokens, prefix), decoded(model, tokens, prefix)
    scale = exact.std()
    assert (full - exact).abs().mean() < 0.05 * scale
    assert (steps - exact).abs().mean() < 0.05 * scale


@torch.no_grad()
def test_positions_unmasked_beyond_the_prefix_are_read_again_until_all_are_there() -> None:
    """Logits are those of a pass over the tokens so far, the first of which see each other."""
    model, tokens = tiny(block=GPTBlockConfig(unmasked=5)), some_tokens()
    prefix = some_prefix(model)
    logits, cache = model.begin(prefix)
    for k in range(12):
        alone = model(tokens[:, : k + 1], prefix)[:, -1]
        torch.testing.assert_close(logits, alone, atol=1e-5, rtol=1e-5)
        assert (cache.again is None) == (1 + k >= 5)
        if k < 11:
            logits = model.step(tokens[:, k : k + 1], cache)


@settings(max_examples=20, deadline=None)
@given(
    kind=st.sampled_from(sorted(KINDS)),
    cuts=st.lists(st.integers(0, 10), max_size=4),
    unmasked=st.integers(0, 9),
    order=st.sampled_from(["raster", "random", "rar"]),
)
@torch.no_grad()
def test_tokens_may_be_read_many_at_once_wherever_they_are_cut(
    kind: str, cuts: list[int], unmasked: int, order: str
) -> None:
    block = GPTBlockConfig(unmasked) if kind == "gpt" else KINDS[kind]
    model = tiny(block=block, condition=CodesCondition(7, [1, 3]), order=order)
    prefix, tokens = some_prefix(model), some_tokens()
    ends = [*sorted(set(cuts)), 11]
    logits, cache = model.begin(prefix, tokens[:, : ends[0]])
    for start, end in zip(ends, [*ends[1:], 12], strict=True):
        full = model(tokens[:, : start + 1], prefix)[:, -1]
        torch.testing.assert_close(logits, full, atol=1e-4, rtol=1e-4)
        if end < 12:
            logits = model.step(tokens[:, start:end], cache)


@settings(deadline=None)
@given(st.integers(1, 9), st.integers(0, 10), st.booleans(), st.randoms(use_true_random=False))
def test_attention_without_a_mask_equals_attention_with_one(
    positions: int, unmasked: int, causal: bool, random: Any
) -> None:
    randomness = torch.Generator().manual_seed(random.randrange(2**31))
    query, key, value = torch.randn(3, 2, 2, positions, 4, generator=randomness)
    allowed = torch.ones(positions, positions).tril() > 0
    allowed[:unmasked, :unmasked] = True
    scores = query @ key.transpose(2, 3) / 2
    if causal:
        scores = scores.masked_fill(~allowed, -torch.inf)
    obvious = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
    found = attend(query, key, value, causal, unmasked=unmasked)
    assert torch.allclose(found, obvious, atol=1e-5)
    first = random.randrange(min(unmasked, positions - 1), positions)  # of what is not read yet
    last = attend(query[:, :, first:], key, value, causal, unmasked=unmasked)
    assert torch.allclose(last, obvious[:, first:], atol=1e-5)


@each_kind
def test_a_prior_trains_by_the_quick_attention_as_by_the_plain_one(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_cpu, "mkl_is_slow", lambda: True)
    monkeypatch.setattr(attention_cpu, "LEAST", 8)
    model = tiny(block=KINDS[kind])
    tokens, prefix = some_tokens(), some_prefix(model)
    found = []
    with mock.patch.object(attention_cpu, "attention", wraps=attention_cpu.attention) as watched:
        for plainly in (False, True):
            if plainly:
                assert watched.call_count == model.config.layers
                run_plainly(model)
            model.zero_grad()
            logits = model(tokens, prefix)
            logits.square().mean().backward()
            found.append([logits, *(p.grad for p in model.parameters() if p.grad is not None)])
        assert watched.call_count == model.config.layers
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)


def test_heads_are_rotated_as_complex_numbers_by_row_and_column() -> None:
    places = torch.tensor([[-1, 0, 1, 5, 11], [-1, 11, 4, 0, 3]])
    x = torch.randn(2, 3, 5, 8, generator=torch.Generator().manual_seed(0))
    found = rotated(x, rotations(places, 4, 8))
    for image in range(2):
        for at, place in enumerate(places[image].tolist()):
            row, column = divmod(max(place, 0), 4)
            angles = torch.tensor([row, row / 100, column, column / 100])
            numbers = torch.complex(x[image, :, at, :4], x[image, :, at, 4:])
            turned = numbers * torch.polar(torch.ones(4), angles)
            both = torch.cat([turned.real, turned.imag], dim=-1)
            assert torch.allclose(found[image, :, at], both, atol=1e-5)
    assert torch.equal(found[:, :, 0], x[:, :, 0])  # the prefix


@pytest.mark.parametrize(("width", "hidden"), [(768, 2048), (1024, 2816), (1280, 3584)])
def test_swiglu_is_as_wide_as_llamagens(width: int, hidden: int) -> None:
    with torch.device("meta"):
        assert SwiGLU(width).down.in_features == hidden


def test_a_prefix_of_several_tokens_has_learned_positions_beside_rotary_ones() -> None:
    model = tiny(block="llama", condition=CodesCondition(7, [2, 2]))
    assert model.pos_emb.shape == (1, 4, 16)
    tokens, prefix = some_tokens(), some_prefix(model)
    with torch.no_grad():
        full = model(tokens, prefix)
        swapped = model(tokens, Prefix((prefix.parts[0][:, [1, 0, 2, 3]],)))
        assert not torch.allclose(full, swapped, atol=1e-3)
        model.pos_emb.zero_()  # causal attention still tells the first from the rest
        assert not torch.allclose(model(tokens, prefix), full, atol=1e-3)
    assert tiny(block="llama", condition=ClassCondition(5)).pos_emb is None


@pytest.mark.parametrize("block", [RARBlockConfig(), LlamaBlockConfig(adaptive=True)])
def test_adaptive_norms_read_the_condition_past_attention(block: Any) -> None:
    """With values of zero attention reads nothing, and only the norms can tell classes apart."""
    model = tiny(block=block, condition=ClassCondition(5))
    tokens = torch.full((2, 12), 3)
    with torch.no_grad():
        for layer in model.blocks:
            layer.attn.proj.weight.zero_()
        logits = model(tokens, torch.tensor([[1], [2]]))
    assert (logits[0] - logits[1]).abs().amax(dim=-1).min() > 1e-3


def test_first_values_are_those_of_the_sources() -> None:
    """LlamaGen: normal of 0.02, a head of zeros. RAR: norms that are not moved, blocks that add
    nothing."""
    torch.manual_seed(0)
    sizes = {"vocabulary": 512, "grid": [2, 2], "layers": 1, "heads": 4, "width": 256}
    tokens, prefix = torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.int64)
    llama = Transformer(TransformerConfig(**sizes, block="llama"))
    block = llama.blocks[0]
    matrices = [llama.tok_emb, block.attn.qkv, block.attn.proj, block.mlp.gate_up, block.mlp.down]
    assert all(abs(matrix.weight.std().item() - 0.02) < 1e-3 for matrix in matrices)
    assert not llama(tokens, prefix).any()
    rar = Transformer(TransformerConfig(**sizes, block="rar"))
    x = torch.randn(1, 4, 256)
    signal = torch.randn(1, 256)
    assert torch.equal(rar.blocks[0](x, Around(signal=signal)), x)
    assert rar(tokens, prefix).any()


@each_kind
def test_matrices_decay_and_nothing_else_does(kind: str) -> None:
    model = tiny(block=KINDS[kind], condition=ClassCondition(5), null_prefix=True)
    decayed, free = decay_groups(model, 0.1)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    kept = {names[id(p)] for p in free["params"]}
    assert {"tok_emb.weight", "cond_emb.weight", "null_emb"} <= kept
    assert all(p.ndim == 2 for p in decayed["params"])
    tables = {name for name in kept if name.endswith("_emb") or name.endswith("_emb.weight")}
    assert all(model.get_parameter(name).ndim == 1 for name in kept - tables)


def parameters_of(**settings: Any) -> int:
    with torch.device("meta"):
        model = Transformer(TransformerConfig(condition_table="own", null_prefix=True, **settings))
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("layers", "width", "heads", "millions"),
    [(12, 768, 12, 111), (24, 1024, 16, 343), (36, 1280, 20, 775), (48, 1536, 24, 1411)],
    ids=["B", "L", "XL", "XXL"],
)
def test_llamagens_have_their_parameter_counts(
    layers: int, width: int, heads: int, millions: int
) -> None:
    """Source: arXiv 2406.06525, table 1 (XXL: 1.4 B)."""
    found = parameters_of(
        vocabulary=16_384,
        grid=[16, 16],
        layers=layers,
        width=width,
        heads=heads,
        condition=ClassCondition(1000),
        block=LlamaBlockConfig(qk_norm=False),
    )
    assert round(found / 1e6) == millions


def test_rar_b_has_its_parameter_count() -> None:
    """Source: arXiv 2411.00776, table 1 (261 M), of which 2 M are what is not here: rows of its
    tables that nothing reads, its embeddings of steps, a start token and the head's bias."""
    found = parameters_of(
        vocabulary=1024,
        grid=[16, 16],
        layers=24,
        width=768,
        heads=16,
        condition=ClassCondition(1000),
        block="rar",
    )
    assert round(found / 1e6) == 259
    positions, steps, mask_and_start = 256 + 1024, 256 + 100, 2
    rows = (positions - 256) + positions + steps + mask_and_start
    assert round((found + 768 * rows + 1024) / 1e6) == 261


def test_heads_of_another_width_are_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"model\.heads: 8 heads of width=16 are 2 wide"):
        tiny(block="llama", heads=8)
    with pytest.raises(UserError, match=r"model\.block\.unmasked"):
        tiny(block={"name": "gpt", "unmasked": -1})


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
    return tiny(block="toy")


def test_a_block_may_bring_positions_norm_and_heads_of_its_own(toy: Transformer) -> None:
    assert toy.pos_emb is None
    assert isinstance(toy.ln_f, nn.RMSNorm)
    _, cache = toy.begin(toy.condition.prefix(3, {}))
    assert [keys.shape for keys in cache.keys] == [(3, 1, 16, 8)] * 2
    assert isinstance(toy.blocks[0], toy.block_types)


def test_it_decodes_with_the_cache_what_the_full_pass_gives(toy: Transformer) -> None:
    tokens, prefix = some_tokens(), toy.condition.prefix(3, {})
    with torch.no_grad():
        full = toy(tokens, prefix)
        assert torch.allclose(decoded(toy, tokens, prefix), full, atol=1e-5)
        swapped = toy(tokens[:, [1, 0, *range(2, 12)]], prefix)
    assert not torch.allclose(swapped[:, -1], full[:, -1], atol=1e-3)  # positions count


def test_its_export_says_which_block_it_has(toy: Transformer) -> None:
    written = toy.canonical_config()
    assert written["block"] == {"name": "toy", "base": 100.0}
    again = TransformerConfig.present({name: written[name] for name in written if name != "kind"})
    assert TransformerConfig(**again) == toy.config


@each_kind
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_where_no_step_follows_nothing_is_kept_and_the_logits_are_the_same(
    kind: str, precision: torch.dtype
) -> None:
    model = tiny(block=KINDS[kind], condition=CodesCondition(7, [2, 2]))
    prefix, tokens = some_prefix(model), some_tokens()[:, :5]
    with torch.autocast("cpu", precision, enabled=precision != torch.float32):
        kept, cache = model.begin(prefix, tokens)
        logits, nothing = model.begin(prefix, tokens, once=True)
    assert torch.equal(logits, kept)
    assert all(keys.numel() > 0 for keys in cache.keys)
    assert all(layer.numel() == 0 for layer in (*nothing.keys, *nothing.values))


@each_kind
def test_a_layer_makes_four_products_of_what_it_reads(kind: str) -> None:
    """Queries, keys and values together, their way back, and two of the perceptron."""
    model = tiny(block=KINDS[kind], condition=CodesCondition(7, [2, 2]))
    tokens, prefix = some_tokens(), some_prefix(model)
    with mock.patch.object(F, "linear", wraps=F.linear) as linear:
        model(tokens, prefix)
    large = [call for call in linear.call_args_list if call.args[0].ndim == 3]
    assert len(large) == 4 * len(model.blocks) + 1  # and the logits
