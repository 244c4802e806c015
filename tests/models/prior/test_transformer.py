"""The transformer against the original's numbers, and against itself with and without a cache.

golden/transformer_gpt.pt, transformer_class.pt and transformer_coordinates.pt hold weights, inputs
and outputs recorded from the original implementation (GPT alone; class-conditional with pkeep;
with coordinates of whole images of 32 pixels, which has the weights and codes of the second);
transformer_unmasked.pt the outputs of the first with n_unmasked=16.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from taming_dist.errors import UserError
from taming_dist.generation.captured import Captured
from taming_dist.losses.tokens import corrupt, token_nll
from taming_dist.models.joined import as_stored, stored_parameters
from taming_dist.models.prior.blocks import GPTBlockConfig
from taming_dist.models.prior.conditions import (
    ClassCondition,
    CodesCondition,
    CoordinatesCondition,
)
from taming_dist.models.prior.prefix import as_prefix
from taming_dist.models.prior.schemes import NextIndex, one_by_one
from taming_dist.models.prior.transformer import Transformer, TransformerConfig, decay_groups

GOLDEN = Path(__file__).parents[2] / "golden"


def load_golden(name: str) -> dict[str, Any]:
    return torch.load(GOLDEN / f"transformer_{name}.pt", weights_only=True)


def original(golden: dict[str, Any], **settings: Any) -> Transformer:
    sizes = golden["config"]
    config = TransformerConfig(
        vocabulary=sizes["vocab_size"],
        block_size=sizes["block_size"],
        layers=sizes["n_layer"],
        heads=sizes["n_head"],
        width=sizes["n_embd"],
        **settings,
    )
    model = Transformer(config)
    untrained = {"pos_emb": torch.zeros_like(model.pos_emb)}  # recorded only where it is not zero
    model.load_state_dict(untrained | golden["weights"])
    return model.eval()


def tiny(seed: int = 0, **settings: Any) -> Transformer:
    """A transformer with logits far from flat, so that a wrong mask or position shows."""
    config = TransformerConfig(
        **{"vocabulary": 24, "grid": [3, 4], "layers": 2, "heads": 2, "width": 16} | settings
    )
    model = Transformer(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model.eval()


def greedy(model: Transformer, prompt: Tensor, count: int) -> Tensor:
    with torch.no_grad():
        logits, cache = model.begin(prompt)
        chosen = [logits.argmax(dim=-1, keepdim=True)]
        while len(chosen) < count:
            chosen.append(model.step(chosen[-1], cache).argmax(dim=-1, keepdim=True))
    return torch.cat(chosen, dim=1)


@pytest.mark.parametrize("outputs", ["gpt", "unmasked"])
def test_logits_loss_and_gradients_equal_the_original_gpt(outputs: str) -> None:
    golden = load_golden("gpt") | load_golden(outputs)
    block = GPTBlockConfig(golden["config"]["n_unmasked"])
    model = original(golden, grid=[5, 8], block=block)
    ids = golden["ids"]
    # The last token is a target only, so any token can stand there.
    logits = model(torch.cat([ids[:, 1:], ids[:, :1]], dim=1), prefix=ids[:, :1])
    assert torch.allclose(logits[:, ::8], golden["logits"], atol=1e-5)
    loss = token_nll(logits, golden["targets"])
    assert loss.item() == pytest.approx(golden["loss"].item(), abs=1e-6)
    loss.backward()
    gradients = as_stored(model, {name: p.grad for name, p in model.named_parameters()})
    norms = {name: gradient.norm().item() for name, gradient in gradients.items()}
    assert norms == pytest.approx(golden["gradnorm"], rel=1e-4, abs=1e-8)


@pytest.mark.parametrize("outputs", ["gpt", "unmasked"])
@torch.no_grad()
def test_greedy_decoding_equals_the_originals_full_passes(outputs: str) -> None:
    """Also where positions see later ones, and a cache would be wrong, as the original's is."""
    golden = load_golden("gpt") | load_golden(outputs)
    block = GPTBlockConfig(golden["config"]["n_unmasked"])
    model = original(golden, grid=[5, 8], block=block)
    prompt, expected = golden["ids"][:, :3], golden["greedy"]
    assert torch.equal(greedy(model, prompt, 24), expected)
    prefix, nothing = as_prefix(prompt), torch.zeros(len(prompt), 24)
    for repeat in (one_by_one, Captured()):  # with a cache that is sliced, and a static one
        found = NextIndex().generate(
            model, prefix, 24, 64, lambda logits, _: logits.argmax(1), nothing, repeat=repeat
        )
        assert torch.equal(found, expected)
    uncached = torch.zeros_like(expected)
    for k in range(24):
        uncached[:, k] = model(uncached[:, : k + 1], prompt)[:, -1].argmax(1)
    assert torch.equal(uncached, expected)


def test_class_conditional_logits_loss_and_samples_equal_the_original() -> None:
    golden = load_golden("class")
    model = original(golden, grid=[8, 8], condition=ClassCondition(10))
    codes = golden["codes"]
    prefix = model.condition.prefix(2, {"cls": golden["classes"]})
    logits = model(codes, prefix)
    assert torch.allclose(logits[:, ::8], golden["logits"], atol=1e-5)
    assert token_nll(logits, codes).item() == pytest.approx(golden["loss"].item(), abs=1e-6)
    assert torch.equal(greedy(model, prefix, 64), golden["greedy"])


def test_coordinates_logits_loss_and_samples_equal_the_original() -> None:
    golden, codes = load_golden("coordinates"), load_golden("class")["codes"]
    condition = CoordinatesCondition(steps=64, grid=[8, 8], factor=4, vocabulary=64)
    model = original(load_golden("class"), grid=[8, 8], condition=condition)
    prefix = model.condition.prefix(2, {})
    assert torch.equal(prefix.parts[0], golden["coordinates"])
    logits = model(codes, prefix)
    assert torch.allclose(logits[:, ::8], golden["logits"], atol=1e-5)
    assert token_nll(logits, codes).item() == pytest.approx(golden["loss"].item(), abs=1e-6)
    assert torch.equal(greedy(model, prefix, 64), golden["greedy"])


def test_inputs_with_pkeep_one_half_give_the_original_logits() -> None:
    golden = load_golden("class")
    model = original(golden, grid=[8, 8], condition=ClassCondition(10))
    codes = golden["codes"]
    torch.manual_seed(13)
    kept = torch.bernoulli(0.5 * torch.ones(codes.shape))
    noise = torch.randint_like(codes, 64)
    noisy = corrupt(codes, 0.5, chance=1 - kept, noise=noise)
    logits = model(noisy, golden["classes"].unsqueeze(1))
    assert torch.allclose(logits[:, ::8], golden["pkeep_logits"], atol=1e-5)


def test_a_condition_with_a_table_of_its_own_may_be_larger_than_the_codebook() -> None:
    """Everything depends on the class, through a row that no code reads."""
    model = tiny(condition=ClassCondition(1000), condition_table="own")
    prefix = model.condition.prefix(3, {"cls": torch.tensor([3, 999, 998])})
    tokens = torch.full((3, 12), 3)
    logits = model(tokens, prefix)
    assert logits.shape == (3, 12, 24)
    assert (logits[1] - logits[2]).abs().amax(dim=-1).min() > 1e-3
    logits[0].sum().backward()
    rows = model.cond_emb.weight.grad.abs().sum(dim=1).nonzero().flatten()
    assert rows.tolist() == [3]
    with torch.no_grad():
        model.cond_emb.weight[3] += 1
        changed = model(tokens, prefix)
    assert torch.equal(changed[1:], logits[1:])  # code 3 reads another row than class 3


def test_an_own_table_with_the_rows_of_the_codes_is_the_shared_one() -> None:
    settings = {"condition": CodesCondition(24, [2, 2])}
    shared, own = tiny(**settings), tiny(**settings, condition_table="own")
    rows = {"cond_emb.weight": shared.tok_emb.weight}
    own.load_state_dict(shared.state_dict() | rows)
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(24, (2, 12), generator=generator)
    prefix = torch.randint(24, (2, 4), generator=generator)
    with torch.no_grad():
        assert torch.equal(own(tokens, prefix), shared(tokens, prefix))


def test_neither_table_decays_and_both_start_alike() -> None:
    config = TransformerConfig(
        512, [4, 4], width=256, layers=1, condition=ClassCondition(400), condition_table="own"
    )
    model = Transformer(config)
    free = {id(parameter) for parameter in decay_groups(model, 0.01)[1]["params"]}
    assert {id(model.tok_emb.weight), id(model.cond_emb.weight)} <= free
    assert abs(model.cond_emb.weight.std().item() - 0.02) < 1e-3


def test_a_start_token_is_no_condition_and_has_no_table() -> None:
    model = tiny(condition_table="own")
    assert model.cond_emb is None
    assert model.config == tiny().config


def test_weight_decay_reaches_exactly_the_originals_parameters() -> None:
    golden = load_golden("class")
    model = original(golden, grid=[8, 8], condition=ClassCondition(10))
    decayed, free = decay_groups(model, 0.01)
    assert decayed["weight_decay"] == 0.01
    assert free["weight_decay"] == 0.0
    reached = {id(parameter) for parameter in decayed["params"]}
    names = [stored.name for stored in stored_parameters(model) if id(stored.parameter) in reached]
    assert sorted(names) == sorted(golden["decayed"])
    assert len(decayed["params"]) + len(free["params"]) == len(list(model.parameters()))


def test_the_papers_transformer_has_its_parameter_count() -> None:
    with torch.device("meta"):
        model = Transformer(TransformerConfig(vocabulary=1024, grid=[16, 16], block_size=512))
    assert round(sum(p.numel() for p in model.parameters()) / 1e6, 2) == 304.93


def test_initial_weights_are_the_originals() -> None:
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(vocabulary=512, grid=[4, 4], layers=1, width=256))
    matrices = [model.tok_emb.weight, model.head.weight, model.blocks[0].attn.qkv.weight]
    assert all(abs(matrix.std().item() - 0.02) < 1e-3 for matrix in matrices)
    assert not model.pos_emb.any()
    assert not model.blocks[0].mlp[0].bias.any()


def test_the_prefix_may_have_any_length_and_only_codes_get_logits() -> None:
    model = tiny(block_size=20)
    row = torch.arange(20).remainder(24).unsqueeze(0)
    short = model(row[:, 1:], prefix=row[:, :1])
    long = model(row[:, 7:], prefix=row[:, :7])
    assert long.shape == (1, 13, 24)
    assert torch.allclose(long, short[:, 6:], atol=1e-5)


def test_no_logit_depends_on_the_token_it_predicts_or_on_later_ones() -> None:
    model = tiny()
    embedded: list[Tensor] = []
    model.tok_emb.register_forward_hook(lambda *call: embedded.append(call[-1]))
    tokens = torch.randint(24, (1, 12), generator=torch.Generator().manual_seed(1))
    logits = model(tokens, torch.zeros(1, 1, dtype=torch.int64))
    for k in range(12):
        parts = torch.autograd.grad(logits[0, k].square().sum(), embedded, retain_graph=True)
        reached = torch.cat(parts, dim=1)[0].abs().amax(dim=-1) > 0
        # Input position k holds token k - 1 (position 0 is the prefix).
        assert reached.tolist() == [position <= k for position in range(12)]


@pytest.mark.parametrize("table", ["own", "shared"])
@pytest.mark.parametrize("length", [1, 5])
def test_decoding_with_the_cache_equals_the_full_pass(length: int, table: str) -> None:
    model = tiny(
        condition=CodesCondition(24, [1, length]),
        condition_table=table,
    )
    generator = torch.Generator().manual_seed(2)
    prefix = torch.randint(24, (3, length), generator=generator)
    tokens = torch.randint(24, (3, 12), generator=generator)
    with torch.no_grad():
        full = model(tokens, prefix)
        first, cache = model.begin(prefix)
        steps = [first]
        steps += [model.step(tokens[:, k : k + 1], cache) for k in range(11)]
    assert torch.allclose(torch.stack(steps, dim=1), full, atol=1e-5)
    assert cache.length == length + 11


def test_the_cache_is_filled_in_place() -> None:
    model = tiny()
    greedy_prompt = torch.zeros(2, 1, dtype=torch.int64)
    with torch.no_grad():
        _, cache = model.begin(greedy_prompt)
        layers = [*cache.keys, *cache.values]
        assert [layer.shape for layer in layers] == [(2, 2, 16, 8)] * 4
        addresses = [layer.data_ptr() for layer in layers]
        model.step(greedy_prompt, cache)
    assert addresses == [layer.data_ptr() for layer in (*cache.keys, *cache.values)]


def test_dropout_changes_training_only() -> None:
    model = tiny(dropout_embedding=0.5, dropout_attention=0.5, dropout_residual=0.5)
    tokens, prefix = torch.zeros(1, 12, dtype=torch.int64), torch.ones(1, 1, dtype=torch.int64)
    with torch.no_grad():
        assert torch.equal(model(tokens, prefix), model(tokens, prefix))
        model.train()
        assert not torch.allclose(model(tokens, prefix), model(tokens, prefix))


@pytest.mark.parametrize("name", ["embedding", "attention", "residual"])
def test_each_dropout_works_alone(name: str) -> None:
    model = tiny(**{f"dropout_{name}": 0.5}).train()
    tokens, prefix = torch.zeros(1, 12, dtype=torch.int64), torch.ones(1, 1, dtype=torch.int64)
    with torch.no_grad():
        assert not torch.allclose(model(tokens, prefix), model(tokens, prefix))


@pytest.mark.parametrize("table", ["own", "shared"])
def test_an_export_gives_back_the_same_model(tmp_path: Path, table: str) -> None:
    model = tiny(condition=ClassCondition(4), vqgan_fingerprint="abc", condition_table=table)
    model.save_pretrained(tmp_path)
    # exports from before there was a choice have no such key, and are shared
    assert json.loads((tmp_path / "config.json").read_text()).get("condition_table") == (
        "own" if table == "own" else None
    )
    again = Transformer.from_pretrained(tmp_path)
    assert again.config == model.config
    assert again.fingerprint == model.fingerprint
    tokens, prefix = torch.zeros(1, 12, dtype=torch.int64), torch.ones(1, 1, dtype=torch.int64)
    assert torch.equal(again(tokens, prefix), model(tokens, prefix))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"condition": ClassCondition(25)},
            r"model/condition=class: its 25 tokens .* vocabulary=24.* model\.condition_table=own",
        ),
        ({"condition_table": "both"}, r"model\.condition_table=both: use own or shared"),
        ({"condition": "class"}, r"model\.condition\.classes: 0"),
        ({"condition": "depth"}, r"model/condition=depth: use one of none, class, codes"),
        ({"width": 15}, r"model\.width: 15 does not divide by heads=2"),
        ({"grid": []}, r"model\.grid"),
        ({"grid": [2, 3, 4, 5]}, r"model\.grid=\[2, 3, 4, 5\]: give the code grid"),
        ({"grid": [3, 0]}, r"model\.grid"),
        ({"block_size": 11}, r"model\.block_size: 11 .* at least 12"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_by_name(settings: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        tiny(**settings)


def test_more_tokens_than_positions_are_refused() -> None:
    model = tiny()
    with pytest.raises(UserError, match="13 tokens do not fit the model's 12 positions"):
        model(torch.zeros(1, 13, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.int64))
    with pytest.raises(UserError, match="block_size"):
        model.begin(torch.zeros(1, 13, dtype=torch.int64))
