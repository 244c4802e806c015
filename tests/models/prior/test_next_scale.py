"""The scheme that writes an image scale by scale: what positions read and see, against slow forms,
and generation against full passes."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from taming_dist.errors import UserError
from taming_dist.generation.draws import uniforms
from taming_dist.generation.generator import generate_codes
from taming_dist.generation.sampling import Sampling
from taming_dist.models.prior.conditions import ClassCondition, CodesCondition
from taming_dist.models.prior.schemes import KnownTokens, NextScale
from taming_dist.models.prior.transformer import Transformer, TransformerConfig
from taming_dist.models.scales import centres, starts

SCALES, COUNT, VOCABULARY = [1, 2, 3], 14, 20
CODES = torch.randint(VOCABULARY, (2, COUNT), generator=torch.Generator().manual_seed(1))
BLOCKS = pytest.mark.parametrize("block", ["gpt", "llama", "rar"])


def tiny(block: str = "gpt", **settings: Any) -> Transformer:
    """A transformer with logits far from flat and a prefix of three tokens."""
    usual: dict[str, Any] = {
        "layers": 2,
        "heads": 2,
        "width": 16,
        "condition": CodesCondition(7, [1, 3]),
        "condition_table": "own",
        "scheme": NextScale(scales=SCALES),
    }
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(VOCABULARY, [COUNT], block=block, **usual | settings))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.3)
    return model.eval()


def prefix_of(model: Transformer, images: int) -> Any:
    columns = {"cond": torch.tensor([[[1, 0, 6]], [[2, 2, 5]], [[4, 3, 0]]])[:images]}
    return model.condition.prefix(images, columns)


@torch.no_grad()
def test_a_token_reads_the_sum_of_all_earlier_scales_where_it_is() -> None:
    model = tiny()
    read: list[Tensor] = []
    model.blocks[0].register_forward_pre_hook(lambda _, args: read.append(args[0]))
    model(CODES, prefix_of(model, 2))
    total = torch.zeros(2, 16, 3, 3)
    begin = starts(SCALES)
    for k, side in enumerate(SCALES[1:], 1):
        before = model.tok_emb.weight[CODES[:, begin[k - 1] : begin[k]]]
        grid = before.transpose(1, 2).unflatten(2, (SCALES[k - 1],) * 2)
        total = total + F.interpolate(grid, (3, 3), mode="bicubic")
        expected = F.interpolate(total, (side, side), mode="area").flatten(2).transpose(1, 2)
        positions = slice(3 + begin[k] - 1, 3 + begin[k + 1] - 1)
        expected = expected + model.pos_emb[0, positions]
        torch.testing.assert_close(read[0][:, positions], expected)
    assert read[0].shape[1] == 3 + COUNT - 1


@BLOCKS
@torch.no_grad()
def test_a_code_changes_no_logits_of_its_own_scale_and_those_before(block: str) -> None:
    model, begin = tiny(block), starts(SCALES)
    prefix = prefix_of(model, 2)
    before = model(CODES, prefix)
    for place in range(COUNT):
        changed = CODES.clone()
        changed[:, place] = (changed[:, place] + 1) % VOCABULARY
        moved = (model(changed, prefix) - before).abs().amax((0, 2))
        own = next(k for k in range(3) if place < begin[k + 1])
        assert torch.equal(moved[: begin[own + 1]], torch.zeros(begin[own + 1]))
        assert (moved[begin[own + 1] :] > 0).all()  # each later position sees it


@torch.no_grad()
def test_the_whole_prefix_sees_itself() -> None:
    """Its first position sees the last one, which no logit shows but in layers of more than one."""
    model = tiny()
    seen: list[Tensor] = []
    model.blocks[0].register_forward_hook(lambda _, args, out: seen.append(out))
    for last in (6, 5):
        columns = {"cond": torch.tensor([[[1, 0, last]]])}
        model(CODES[:1], model.condition.prefix(1, columns))
    assert not torch.equal(seen[0][0, 0], seen[1][0, 0])


@BLOCKS
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@torch.no_grad()
def test_an_image_is_what_full_passes_give_scale_by_scale(block: str, temperature: float) -> None:
    model, begin = tiny(block), starts(SCALES)
    sampling, prefix = Sampling(temperature, top_k=7), prefix_of(model, 2)
    found = generate_codes(model, prefix, sampling, 5, [3, 8])
    drawn = uniforms(5, [3, 8], COUNT, torch.device("cpu"))
    expected = torch.zeros(2, COUNT, dtype=torch.int64)
    for k in range(len(SCALES)):  # the whole sequence anew for each scale
        logits = model(expected, prefix)
        for place in range(begin[k], begin[k + 1]):
            expected[:, place] = sampling.choose(logits[:, place], drawn[:, place])
    assert torch.equal(found, expected)
    assert found.shape == (2, COUNT)


@torch.no_grad()
def test_the_cache_gives_the_logits_of_the_full_pass() -> None:
    model = tiny("llama")
    prefix = prefix_of(model, 2)
    first, cache = model.begin(prefix)
    found = [first[:, None]]
    for end in starts(SCALES)[1:-1]:
        found.append(model.several(CODES[:, :end], cache))
    torch.testing.assert_close(torch.cat(found, 1), model(CODES, prefix), atol=1e-5, rtol=1e-5)


def guidable() -> Transformer:
    return tiny(condition=ClassCondition(3), null_prefix=True)


@torch.no_grad()
def test_guidance_is_the_formula_and_1_is_none() -> None:
    model = guidable()
    prefix = model.condition.prefix(2, {"cls": torch.tensor([0, 2])})
    plain = generate_codes(model, prefix, Sampling(), 0, [0, 1])
    scheme = model.scheme.sampled_with({})
    drawn = uniforms(0, [0, 1], COUNT, torch.device("cpu"))

    def under(sampling: Sampling) -> Tensor:
        network = sampling.network(model)
        return scheme.generate(network, prefix, COUNT, VOCABULARY, sampling.choose, drawn)

    ones = Sampling(guidance=1.0 + 1e-12)  # takes the way of guidance, and its scales are 1 in fp32
    assert torch.equal(under(ones), plain)
    strong = Sampling(temperature=0, guidance=3.0, guidance_schedule="linear")
    expected = torch.zeros(2, COUNT, dtype=torch.int64)
    null = prefix.dropping(torch.ones(2, dtype=torch.bool))
    for begin, end in zip(starts(SCALES), starts(SCALES)[1:], strict=False):
        with_it, without = model(expected, prefix), model(expected, null)
        scale = 1 + 2 * begin / COUNT
        expected[:, begin:end] = (without + scale * (with_it - without))[:, begin:end].argmax(-1)
    assert torch.equal(under(strong), expected)
    assert not torch.equal(expected, generate_codes(model, prefix, Sampling(0.0), 0, [0, 1]))


@torch.no_grad()
def test_an_image_does_not_depend_on_its_batch() -> None:
    model = guidable()
    sampling = Sampling(guidance=2.0, top_p=0.9)
    prefix = model.condition.prefix(3, {"cls": torch.tensor([0, 2, 1])})
    together = generate_codes(model, prefix, sampling, 4, [5, 6, 9])
    alone = generate_codes(model, prefix.rows(slice(1, 2)), sampling, 4, [6])
    assert torch.equal(together[1:2], alone)


def test_centres_are_the_places_under_the_middle_of_each_code() -> None:
    found = centres((1, 2, 4), torch.device("cpu"))
    assert found.tolist() == [10, 5, 7, 13, 15, *range(16)]


def test_dropout_of_attention_works_with_its_mask() -> None:
    model = tiny(dropout_attention=0.5).train()
    one, other = (model(CODES, prefix_of(model, 2)) for _ in range(2))
    assert not torch.equal(one, other)


def test_an_export_gives_back_the_same_model(tmp_path: Any) -> None:
    model = tiny()
    model.save_pretrained(tmp_path)
    loaded = Transformer.from_pretrained(tmp_path)
    assert loaded.config == model.config
    assert loaded.fingerprint == model.fingerprint


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        (
            {"scheme": NextScale([1, 2])},
            r"model\.scheme\.scales=\[1, 2\]: these are \[5\] codes",
        ),
        ({"order": "random"}, "model/order=random: model/scheme=next_scale has its own"),
        ({"block": {"name": "gpt", "unmasked": 2}}, r"model\.block\.unmasked=2: with"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(settings: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=line):
        tiny(**settings)
    with pytest.raises(UserError, match=r"model\.scheme\.scales=\[2, 3\]: use ascending sides"):
        NextScale([2, 3])


def test_known_tokens_are_refused() -> None:
    model = tiny()
    known = KnownTokens(CODES, CODES > 3)
    with pytest.raises(UserError, match="known: a transformer of model/scheme=next_scale writes"):
        model.scheme.generate(
            model, prefix_of(model, 2), COUNT, VOCABULARY, Sampling().choose, CODES.double(), known
        )
