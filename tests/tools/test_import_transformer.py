"""Checkpoints of Net2NetTransformer become exports: the transformer and the VQGANs inside it.

Logits are compared with those of a slow transformer written out here, which uses the checkpoint's
own masks and indices; golden/ has numbers that the original itself gave.
"""

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from taming_dist import VQGAN, Generator, Transformer
from taming_dist.errors import UserError
from taming_dist.generation.generator import generate_codes
from taming_dist.generation.sampling import Sampling
from taming_dist.losses.tokens import token_nll
from taming_dist.models.modalities import RGB, Depth, LabelMap, LowResolution
from taming_dist.models.prior.conditions import (
    ClassCondition,
    CodesCondition,
    CoordinatesCondition,
    ObjectsCondition,
    Unconditional,
)
from taming_dist.models.prior.orders import ORDERS, arrange
from taming_dist.taming_compat.orders import PERMUTERS, export_order, import_order
from tests.tools.conftest import TOOLS, describe

GOLDEN = Path(__file__).parents[1] / "golden"
import_checkpoint = runpy.run_path(str(TOOLS / "import_checkpoint.py"))["main"]
export_model = runpy.run_path(str(TOOLS / "export_model.py"))["main"]
Params = dict[str, Any]


def ddconfig(images: int = 3) -> Params:
    return {
        "double_z": False,
        "z_channels": 8,
        "resolution": 8,
        "in_channels": images,
        "out_ch": images,
        "ch": 32,
        "ch_mult": [1, 2],
        "num_res_blocks": 1,
        "attn_resolutions": [4],
        "dropout": 0.0,
    }


def vqmodel(name: str = "VQModel", images: int = 3, **params: Any) -> Params:
    sizes = {"n_embed": 12, "embed_dim": 4, "ddconfig": ddconfig(images)}
    return {"target": f"taming.models.vqgan.{name}", "params": sizes | params}


def net2net(stage: Any = None, key: str = "class_label", block: int = 16, **more: Any) -> Params:
    """The parameters of a Net2NetTransformer in its YAML file; `stage` is its condition's."""
    gpt = {"vocab_size": 12, "block_size": block, "n_layer": 2, "n_head": 2, "n_embd": 8}
    labels = {"target": "taming.modules.util.Labelator", "params": {"n_classes": 5}}
    return {
        "transformer_config": {"target": "x", "params": gpt},
        "first_stage_config": vqmodel(),
        "cond_stage_config": stage or labels,
        "cond_stage_key": key,
    } | more


SEGMENTATION = vqmodel("VQSegmentationModel", 5, n_labels=5)
COORDINATES = {
    "target": "taming.modules.misc.coord.CoordStage",
    "params": {"n_embed": 12, "down_factor": 2},
}


def logits_by_hand(checkpoint: dict[str, Tensor], heads: int, ids: Tensor) -> Tensor:
    """minGPT as it is written in every tutorial, with the masks of the checkpoint."""
    state = {
        name.removeprefix("transformer."): value
        for name, value in checkpoint.items()
        if name.startswith("transformer.")
    }

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])

    t = ids.shape[1]
    x = state["tok_emb.weight"][ids] + state["pos_emb"][:, :t]
    for layer in range(len({name.split(".")[1] for name in state if "blocks" in name})):
        block = f"blocks.{layer}"
        query, key, value = (
            linear(f"{block}.attn.{part}", norm(f"{block}.ln1", x)).unflatten(2, (heads, -1))
            for part in ("query", "key", "value")
        )
        scores = torch.einsum("bqhd,bkhd->bhqk", query, key) / query.shape[-1] ** 0.5
        hidden = state[f"{block}.attn.mask"][:, :, :t, :t] == 0
        shares = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        read = torch.einsum("bhqk,bkhd->bqhd", shares, value).flatten(2)
        x = x + linear(f"{block}.attn.proj", read)
        x = x + linear(f"{block}.mlp.2", F.gelu(linear(f"{block}.mlp.0", norm(f"{block}.ln2", x))))
    return norm("ln_f", x) @ state["head.weight"].T


def check_logits(checkpoint: dict[str, Tensor], transformer: Transformer, front: Tensor) -> None:
    """Codes in the checkpoint's order after the ids `front` [b, m] have the same logits in both."""
    codes = torch.randint(12, (len(front), 4, 4), generator=torch.Generator().manual_seed(1))
    forward = checkpoint.get("permuter.forward_shuffle_idx", torch.arange(16))
    ids = torch.cat([front, codes.flatten(1)[:, forward]], dim=1)[:, :-1]
    expected = logits_by_hand(checkpoint, transformer.config.heads, ids)[:, front.shape[1] - 1 :]
    with torch.no_grad():
        found = transformer(arrange(codes, transformer.places), front)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


# Conditions


def test_a_label_map_travels_with_the_transformer_and_its_z_curve(
    original: Any, convert: Callable[..., str], tmp_path: Path
) -> None:
    """As the paper's semantic synthesis: two VQGANs, a permuter, the colours of the labels."""
    z_curve = ORDERS["z_curve"]().places((4, 4))
    tensors = original.net2net(block=40) | original.condition(labels=5)
    tensors |= original.permuter(z_curve.tolist())
    permuter = {"target": "taming.modules.transformer.permuter.ZCurve", "params": {"H": 4, "W": 4}}
    params = net2net(SEGMENTATION, "segmentation", 40, permuter_config=permuter, pkeep=0.9)
    said = convert(tensors, "--config", describe(tmp_path, params))
    assert "left out: 1 tensors colorize" in said
    vqgan, second = (VQGAN.from_pretrained(tmp_path / "out" / name) for name in FOLDERS)
    assert second.config.modality == LabelMap(5)
    transformer = Transformer.from_pretrained(tmp_path / "out")
    config = transformer.config
    assert config.condition == CodesCondition(12, [4, 4], second.tokenizer_fingerprint)
    assert (config.order.name, config.vqgan_fingerprint) == ("z_curve", vqgan.tokenizer_fingerprint)
    labels = F.one_hot(torch.randint(5, (2, 8, 8)), 5).movedim(-1, 1).float()
    cond = second.encode(labels)
    check_logits(tensors, transformer, cond.flatten(1))
    samples = Generator(transformer, vqgan).sample(condition=cond, seed=0)
    assert samples.images.shape == (2, 3, 8, 8)


FOLDERS = ("vqgan", "condition_vqgan")


def test_a_condition_of_fewer_pixels_has_fewer_codes(
    original: Any, convert: Callable[..., str], tmp_path: Path
) -> None:
    tensors = original.net2net(block=20) | original.condition(labels=None)
    depth = vqmodel(images=1)
    small = {"downsample_cond_size": 4}
    convert(tensors, "--config", describe(tmp_path, net2net(depth, "depth", 20, **small)))
    second = VQGAN.from_pretrained(tmp_path / "out" / "condition_vqgan")
    assert second.config.modality == Depth()
    transformer = Transformer.from_pretrained(tmp_path / "out")
    assert transformer.config.condition == CodesCondition(12, [2, 2], second.tokenizer_fingerprint)
    check_logits(tensors, transformer, torch.tensor([[3, 11, 0, 1]]))
    # without a YAML file the user says so
    options = ("--resolution", 8, "--heads", 2, "--condition-size", 4)
    convert(tensors, *options)
    assert Transformer.from_pretrained(tmp_path / "out").fingerprint == transformer.fingerprint


def test_the_first_stage_may_be_that_of_the_condition_too(
    original: Any, convert: Callable[..., str], tmp_path: Path
) -> None:
    """As for super-resolution: __is_first_stage__ puts the same tensors under both names."""
    tensors = original.net2net(block=32)
    twice = {
        name.replace("first_stage_model", "cond_stage_model"): value
        for name, value in tensors.items()
        if name.startswith("first_stage_model")
    }
    path = describe(tmp_path, net2net("__is_first_stage__", "lr", 32))
    for checkpoint in (tensors | twice, tensors):  # safetensors keep them once
        convert(checkpoint, "--config", path)
        vqgan, second = (VQGAN.from_pretrained(tmp_path / "out" / name) for name in FOLDERS)
        assert (vqgan.config.modality, second.config.modality) == (RGB(), LowResolution())
        condition = Transformer.from_pretrained(tmp_path / "out").config.condition
        assert condition == CodesCondition(12, [4, 4], second.tokenizer_fingerprint)


def test_coordinates_are_said_by_the_yaml_file_or_the_user(
    original: Any, convert: Callable[..., str], tmp_path: Path
) -> None:
    tensors = original.net2net(block=32)
    options = ("--resolution", 8, "--heads", 2, "--coordinates", 12)
    convert(tensors, "--config", describe(tmp_path, net2net(COORDINATES, "coord", 32)))
    transformer = Transformer.from_pretrained(tmp_path / "out")
    assert transformer.config.condition == CoordinatesCondition(12, [4, 4], 2, 12)
    prefix = transformer.condition.prefix(1, {})
    check_logits(tensors, transformer, prefix.parts[0])
    convert(tensors, *options)
    assert Transformer.from_pretrained(tmp_path / "out").fingerprint == transformer.fingerprint


def test_a_large_image_of_an_imported_transformer_is_what_the_originals_loop_writes(
    original: Any, convert: Callable[..., str], tmp_path: Path
) -> None:
    """12 x 20 codes, greedy, through a window of 8 x 8 that is placed as its scripts place it."""
    sizes = {"ddconfig": ddconfig() | {"resolution": 16, "attn_resolutions": [8]}}
    labels = {"ddconfig": ddconfig(5) | {"resolution": 16, "attn_resolutions": [8]}}
    stage = vqmodel("VQSegmentationModel", 5, n_labels=5, **labels)
    params = net2net(stage, "segmentation", 128) | {"first_stage_config": vqmodel(**sizes)}
    tensors = original.net2net(block=128) | original.condition(labels=5)
    # logits that depend much on what is read
    tensors["transformer.ln_f.bias"] *= 0
    tensors["transformer.pos_emb"] *= 5
    tensors["transformer.tok_emb.weight"] *= 10
    convert(tensors, "--config", describe(tmp_path, params))
    vqgan, second = (VQGAN.from_pretrained(tmp_path / "out" / name) for name in FOLDERS)
    transformer = Transformer.from_pretrained(tmp_path / "out")
    maps = torch.randint(5, (1, 24, 40), generator=torch.Generator().manual_seed(2))
    cond = second.encode(F.one_hot(maps, 5).movedim(-1, 1).float())
    expected = torch.zeros(1, 12, 20, dtype=torch.int64)
    for i in range(12):
        inside_i = i if i <= 4 else 8 - (12 - i) if 12 - i < 4 else 4
        for j in range(20):
            inside_j = j if j <= 4 else 8 - (20 - j) if 20 - j < 4 else 4
            top, left = i - inside_i, j - inside_j
            seen = (slice(None), slice(top, top + 8), slice(left, left + 8))
            ids = torch.cat([cond[seen].flatten(1), expected[seen].flatten(1)], dim=1)[:, :-1]
            at = 63 + inside_i * 8 + inside_j
            expected[:, i, j] = logits_by_hand(tensors, 2, ids)[:, at].argmax(-1)
    assert len(expected.unique()) > 4
    samples = Generator(transformer, vqgan).sample(condition=cond, size=(24, 40), top_k=1)
    assert torch.equal(samples.codes, expected)
    torch.testing.assert_close(samples.images, vqgan.decode_codes(expected), rtol=0, atol=1e-4)


def test_a_class_conditional_transformer_samples_with_its_vqgan(
    original: Any, convert: Callable[..., str], tmp_path: Path
) -> None:
    tensors, params = original.net2net(), net2net()
    params["transformer_config"]["params"] |= {"resid_pdrop": 0.1, "n_head": 4}
    convert(tensors, "--config", describe(tmp_path, params))
    vqgan = VQGAN.from_pretrained(tmp_path / "out" / "vqgan")
    transformer = Transformer.from_pretrained(tmp_path / "out")
    config = transformer.config
    assert config.vqgan_fingerprint == vqgan.tokenizer_fingerprint
    assert (config.heads, config.condition) == (4, ClassCondition(5))
    assert config.condition_table == "shared"
    assert (config.block_size, list(config.grid), config.dropout_residual) == (16, [4, 4], 0.1)
    for name, value in transformer.state_dict().items():
        assert torch.equal(value, tensors[f"transformer.{name}"]), name
    images, codes = Generator(transformer, vqgan).sample(condition=torch.tensor([1, 4]), seed=0)
    assert images.shape == (2, 3, 8, 8)
    assert codes.shape == (2, 4, 4)


def test_without_a_yaml_file_the_user_says_heads_and_classes(
    original: Any, convert: Callable[..., str], tmp_path: Path
) -> None:
    tensors, size = original.net2net(), ("--resolution", 8)
    with pytest.raises(UserError, match="or --classes N"):
        convert(tensors, *size, "--heads", 2)
    with pytest.raises(UserError, match="or --heads N"):
        convert(tensors, *size, "--classes", 0)
    with pytest.raises(
        UserError, match="16 positions for 1 of the condition and 128 x 128 codes.*--resolution"
    ):
        convert(tensors, "--heads", 2, "--classes", 0)
    convert(tensors, *size, "--heads", 2, "--classes", 0)
    config = Transformer.from_pretrained(tmp_path / "out").config
    assert (config.heads, config.condition) == (2, Unconditional())


def test_a_transformer_without_its_vqgan_is_given_one(
    original: Any, convert: Callable[..., str], tmp_path: Path
) -> None:
    tensors = original.net2net()
    convert(tensors, "--only", "first_stage", "--resolution", 8)
    (tmp_path / "out").rename(tmp_path / "vqgan")
    alone = {name: value for name, value in tensors.items() if name.startswith("transformer.")}
    options = ("--heads", 2, "--classes", 0)
    with pytest.raises(UserError, match=r"has no first_stage_model\.\*: .* --vqgan"):
        convert(alone, *options)
    given = ("--vqgan", tmp_path / "vqgan")
    with pytest.raises(UserError, match="omit --vqgan"):
        convert(tensors, *options, *given)
    convert(alone, *options, *given)
    config = Transformer.from_pretrained(tmp_path / "out").config
    assert (
        config.vqgan_fingerprint == VQGAN.from_pretrained(tmp_path / "vqgan").tokenizer_fingerprint
    )
    assert not (tmp_path / "out" / "vqgan").exists()


def test_the_vqgans_inside_a_transformers_checkpoint_can_be_had_alone(
    original: Any, convert: Callable[..., str], tmp_path: Path
) -> None:
    labels = original.vqmodel(images=5)
    tensors = original.net2net()
    tensors |= {f"cond_stage_model.{name}": value for name, value in labels.items()}
    convert(tensors, "--only", "cond_stage")
    assert VQGAN.from_pretrained(tmp_path / "out").config.modality == LabelMap(5)
    convert(tensors, "--only", "first_stage")
    assert VQGAN.from_pretrained(tmp_path / "out").config.modality == RGB()
    with pytest.raises(UserError, match=r"has no first_stage_model\.\*"):
        convert(labels, "--only", "first_stage")


def test_of_layouts_the_yaml_file_says_what_the_builder_was_told(
    original: Any, convert: Callable[..., str], tmp_path: Path
) -> None:
    stage = {
        "target": "taming.models.dummy_cond_stage.DummyCondStage",
        "params": {"conditional_key": "objects_bbox"},
    }
    params = net2net(stage, "objects_bbox", 24)
    train = {"no_tokens": 12, "max_objects_per_image": 2, "min_object_area": 1e-5}
    path = describe(tmp_path, params, use_group_parameter=True, **train)
    tensors = original.net2net(block=24)
    with pytest.raises(UserError, match="give --categories N"):
        convert(tensors, "--config", path)
    convert(tensors, "--config", path, "--categories", 5)
    transformer = Transformer.from_pretrained(tmp_path / "out")
    expected = ObjectsCondition(5, 12, 2, ["group"], 1e-5)
    assert transformer.config.condition == expected
    check_logits(tensors, transformer, torch.tensor([[6, 0, 5, 11, 11, 11, 0, 8]]))
    path = describe(tmp_path, params, encode_crop=False, **train)
    with pytest.raises(UserError, match="encode_crop: false is not supported"):
        convert(tensors, "--config", path, "--categories", 5)


OPTIONS = ("--resolution", 8, "--heads", 2)


@pytest.mark.parametrize(
    ("params", "tensors", "options", "expected"),
    [
        ({"cond_stage_config": "a.Other"}, [], [], "cond_stage_config: no condition like Other"),
        ({"sos_token": 3, "unconditional": True}, [], [], "sos_token: 3 is not supported"),
        ({}, ["condition"], [], "the condition has a VQGAN, whose codes are not .*=class"),
        ({}, [], ["--classes", 4], "--classes or .* the YAML file is Labelator, with .*5"),
        ({}, [], ["--heads", 4], "--heads 4, but the YAML file says n_head: 2"),
        ({"cond_stage_config": COORDINATES}, [], [], "16 positions for 16 of the condition"),
        ({"cond_stage_config": {"target": "x.VQModel"}}, [], [], "with --condition-vqgan"),
        ({"downsample_cond_size": 4, "cond_stage_config": SEGMENTATION}, ["condition"],
         ["--condition-size", 8], "--condition-size 8, .* downsample_cond_size: 4"),
        ({"pkeep": 0.0}, [], [], "pkeep"),
        ({"transformer_config": None}, [], [], "is a Net2NetTransformer, but .* describes none"),
    ],
)  # fmt: skip
def test_what_the_yaml_file_or_the_user_says_has_to_fit(
    params: Params,
    tensors: list[str],
    options: list[Any],
    expected: str,
    original: Any,
    convert: Callable[..., str],
    tmp_path: Path,
) -> None:
    given = net2net() | params
    if given["transformer_config"] is None:
        del given["transformer_config"]
    more = original.condition() if tensors else {}
    with pytest.raises(UserError, match=expected):
        convert(original.net2net() | more, "--config", describe(tmp_path, given), *options)
    assert not (tmp_path / "out").exists()


# Orders and masks


@pytest.mark.parametrize("name", PERMUTERS)
def test_every_order_of_the_original_is_known_by_its_indices(name: str, original: Any) -> None:
    order = ORDERS[name]()
    indices, described = export_order(order, (8, 8))
    assert import_order(indices, {}, (8, 8)) == order
    assert import_order({}, described, (8, 8)) == order  # the YAML file alone
    if name != "raster":
        written = original.permuter(order.places((8, 8)).tolist())
        assert {f"permuter.{key}": value.tolist() for key, value in indices.items()} == {
            key: value.tolist() for key, value in written.items()
        }


def test_orders_that_are_unknown_damaged_or_not_as_said_are_refused(
    original: Any, convert: Callable[..., str], tmp_path: Path
) -> None:
    tensors, places = original.net2net(), list(range(15, -1, -1))
    backwards = original.permuter(places)
    options = (*OPTIONS, "--classes", 5)
    with pytest.raises(UserError, match=r"permuter.forward_shuffle_idx: .* none of raster, sub"):
        convert(tensors | backwards, *options)
    with pytest.raises(UserError, match=r"has 16 places for 8 x 8 codes: .*--resolution"):
        convert(tensors | backwards, "--resolution", 16, *options[2:])
    with pytest.raises(UserError, match=r"does not have each of 16 places once"):
        convert(tensors | original.permuter([0] * 16), *options)
    indices = {"permuter.backward_shuffle_idx": torch.arange(16)}
    with pytest.raises(UserError, match=r"backward_shuffle_idx is not the inverse"):
        convert(tensors | backwards | indices, *options)
    said = {"target": "x.SpiralIn", "params": {}}
    path = describe(tmp_path, net2net(permuter_config=said))
    with pytest.raises(UserError, match="permuter_config in the YAML file is SpiralIn, whose"):
        convert(tensors | backwards, "--config", path)


def opened(tensors: dict[str, Tensor], first: int) -> dict[str, Tensor]:
    """The checkpoint with masks that are open between the first positions."""
    changed = {name: value.clone() for name, value in tensors.items() if "mask" in name}
    for mask in changed.values():
        mask[..., :first, :first] = 1
    return tensors | changed


def test_positions_that_see_each_other_are_found_in_the_masks(
    original: Any, convert: Callable[..., str], tmp_path: Path
) -> None:
    tensors = opened(original.net2net(block=32) | original.condition(), 16)
    convert(tensors, *OPTIONS)
    transformer = Transformer.from_pretrained(tmp_path / "out")
    assert transformer.config.block.unmasked == 16
    check_logits(tensors, transformer, torch.arange(16)[None] % 12)
    path = describe(tmp_path, net2net(SEGMENTATION, "segmentation", 32))
    text = path.read_text().replace("n_head: 2", "n_head: 2\n        n_unmasked: 9")
    path.write_text(text)
    with pytest.raises(UserError, match="n_unmasked is 9 in the YAML file and 16"):
        convert(tensors, "--config", path)


def test_masks_may_be_missing_and_others_are_refused(
    original: Any, convert: Callable[..., str], tmp_path: Path
) -> None:
    tensors, options = original.net2net(), (*OPTIONS, "--classes", 0)
    convert({name: value for name, value in tensors.items() if "mask" not in name}, *options)
    assert Transformer.from_pretrained(tmp_path / "out").config.block.unmasked == 0
    with pytest.raises(UserError, match=r"blocks.1.attn.mask is neither causal nor open between"):
        convert(tensors | {"transformer.blocks.1.attn.mask": torch.ones(1, 1, 16, 16)}, *options)


# Files


def test_other_files_and_precisions_and_a_trainers_own_keys_make_no_difference(
    original: Any, tool: Callable[..., str], convert: Callable[..., str], tmp_path: Path
) -> None:
    tensors = original.net2net(block=32) | original.condition()
    tensors |= original.permuter(ORDERS["z_curve"]().places((4, 4)).tolist())
    halves = {
        name: value.half() if value.is_floating_point() else value
        for name, value in tensors.items()
    }
    halves = {name: value.contiguous() for name, value in halves.items()}
    losses = {f"first_stage_model.{name}": value for name, value in
              original.fill(original.discriminator() | original.perceptual()).items()}  # fmt: skip
    state = {0: {"step": torch.tensor(9.0), "exp_avg": torch.ones(3)}}
    beside = {"optimizer_states": [{"state": state, "param_groups": [{"lr": 1.0, "params": [0]}]}]}
    beside |= {"lr_schedulers": [], "pytorch-lightning_version": "1.0.8", "callbacks": {}}
    said = convert(halves | losses, *OPTIONS, **beside)
    assert "left out: 22 tensors loss.discriminator.*" in said
    first = Transformer.from_pretrained(tmp_path / "out")
    torch.save(halves, tmp_path / "bare.pt")
    save_file(halves, tmp_path / "model.safetensors")
    for name in ("bare.pt", "model.safetensors"):
        out = tmp_path / name.partition(".")[0]
        tool(import_checkpoint, tmp_path / name, "--out", out, *OPTIONS)
        assert Transformer.from_pretrained(out).fingerprint == first.fingerprint
    with pytest.raises(UserError, match=r"the checkpoint has scale and more, .* no part of"):
        convert(tensors | {"scale": torch.ones(1), "shift": torch.ones(1)}, *OPTIONS)


def test_without_its_vqgan_the_description_says_the_grid(
    original: Any, convert: Callable[..., str], tmp_path: Path
) -> None:
    tensors = original.net2net(block=32)
    alone = {name: value for name, value in tensors.items() if name.startswith("transformer.")}
    params = net2net(SEGMENTATION, "x", 32)
    params["first_stage_config"] = vqmodel(n_embed=10)
    said = convert(alone, "--config", describe(tmp_path, params))
    assert "it has 12 tokens for the 10 codes of its first stage" in said
    assert "the export does not say whose codes it knows" in said
    config = Transformer.from_pretrained(tmp_path / "out").config
    assert (config.grid, config.vqgan_fingerprint) == ([4, 4], "")
    assert config.condition == CodesCondition(12, [4, 4])


# The original's numbers


@pytest.mark.parametrize("name", ["class", "coordinates"])
def test_an_imported_checkpoint_gives_the_numbers_of_the_original(
    name: str, convert: Callable[..., str], tmp_path: Path
) -> None:
    """golden/transformer_class.pt has weights and codes of both."""
    weights = torch.load(GOLDEN / "transformer_class.pt", weights_only=True)
    golden = torch.load(GOLDEN / f"transformer_{name}.pt", weights_only=True)
    mask = torch.ones(128, 128).tril().view(1, 1, 128, 128)
    untrained = {"pos_emb": torch.zeros(1, 128, 32)}  # recorded only where it is not zero
    masks = {f"blocks.{layer}.attn.mask": mask for layer in range(2)}
    tensors = untrained | weights["weights"] | masks
    tensors = {f"transformer.{key}": value for key, value in tensors.items()}
    stages = {
        "class": {"target": "x.Labelator", "params": {"n_classes": 10}},
        "coordinates": {"target": "x.CoordStage", "params": {"n_embed": 64, "down_factor": 4}},
    }
    first = {"n_embed": 64, "ddconfig": {"resolution": 32, "ch_mult": [1, 2, 2]}}
    gpt = {"vocab_size": 64, "block_size": 128, "n_layer": 2, "n_head": 4, "n_embd": 32}
    params = {
        "transformer_config": {"target": "x", "params": gpt},
        "first_stage_config": {"target": "x", "params": first},
        "cond_stage_config": stages[name],
    }
    convert(tensors, "--config", describe(tmp_path, params))
    model = Transformer.from_pretrained(tmp_path / "out")
    codes = weights["codes"]
    prefix = model.condition.prefix(2, {"cls": weights["classes"]} if name == "class" else {})
    if name == "coordinates":
        assert torch.equal(prefix.parts[0], golden["coordinates"])
    logits = model(codes, prefix)
    torch.testing.assert_close(logits[:, ::8], golden["logits"], rtol=0, atol=1e-5)
    assert token_nll(logits, codes).item() == pytest.approx(golden["loss"].item(), abs=1e-6)
    found = generate_codes(model, prefix, Sampling(temperature=0), 0, range(2))
    assert torch.equal(found.flatten(1), golden["greedy"])
