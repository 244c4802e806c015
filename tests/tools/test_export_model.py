"""Models leave as exports and as checkpoints of the original, and come back bit for bit."""

import dataclasses
import json
import runpy
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from taming_dist import VQGAN, Transformer
from taming_dist.engine.checkpoint import Checkpoints
from taming_dist.engine.draft import GivenUp
from taming_dist.engine.pieces import Piece
from taming_dist.engine.snapshot import Snapshot
from taming_dist.engine.world import World
from taming_dist.errors import UserError
from taming_dist.models.joined import stored_parameters
from taming_dist.models.networks import ViTConfig
from taming_dist.models.prior.conditions import (
    ClassCondition,
    CodesCondition,
    CoordinatesCondition,
    ObjectCentersCondition,
    ObjectsCondition,
    SeveralConditions,
)
from taming_dist.models.prior.orders import ORDERS
from taming_dist.models.prior.transformer import TransformerConfig
from taming_dist.models.quantizers import EMAQuantizerConfig, VectorQuantizerConfig
from taming_dist.models.vqgan import VQGANConfig
from taming_dist.taming_compat.first_stage import import_vqgan
from tests.tiny_models import tiny_networks

TOOLS = Path(__file__).parents[2] / "tools"
export_model = runpy.run_path(str(TOOLS / "export_model.py"))["main"]
import_checkpoint = runpy.run_path(str(TOOLS / "import_checkpoint.py"))["main"]


def small(**settings: Any) -> VQGANConfig:
    quantizer = {"name": "vector", "codes": 12, "dim": 4, "legacy": True}
    defaults = {"resolution": 8, "channels": 32, "multipliers": [1, 2], "blocks": 1}
    defaults |= {"quantizer": quantizer, "attention_resolutions": [4], "latent_channels": 4}
    return VQGANConfig(**defaults | settings)


def saved(folder: Path, **settings: Any) -> VQGAN:
    torch.manual_seed(0)
    model = VQGAN(small(**settings))
    model.save_pretrained(folder)
    return model


def gpt(folder: Path, vqgan: VQGAN, **settings: Any) -> Transformer:
    sizes = {"vocabulary": 12, "grid": [4, 4], "layers": 2, "heads": 2, "width": 8}
    sizes |= {"block_size": 32, "vqgan_fingerprint": vqgan.tokenizer_fingerprint}
    model = Transformer(TransformerConfig(**sizes | settings))
    model.save_pretrained(folder)
    return model


def load(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "last.ckpt", weights_only=True)


@pytest.fixture
def round_trip(tmp_path: Path, tool: Callable[..., str]) -> Callable[..., Path]:
    """Export to the original's layout in tmp_path/taming, import from there."""

    def run(model: Path, *options: object) -> Path:
        original, back = tmp_path / "taming", tmp_path / "back"
        tool(export_model, model, "--out", original, "--format", "taming", *options)
        config = ("--config", original / "config.yaml")
        tool(import_checkpoint, original / "last.ckpt", "--out", back, *config)
        return back

    return run


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"modality": {"name": "depth"}},
        {"modality": {"name": "edges"}},
        {"modality": {"name": "low_resolution"}},
        {"modality": {"name": "labels", "classes": 7}, "dropout": 0.1},
        {"modality": {"name": "labels", "classes": 3}},
        {"multipliers": [1, 1, 2], "blocks": 2, "attention_resolutions": []},
        {"quantizer": {"name": "gumbel", "codes": 12, "dim": 4, "kl_weight": 5e-4}},
    ],
)
def test_a_vqgan_comes_back_bit_for_bit(
    settings: dict[str, Any], round_trip: Callable[..., Path], tmp_path: Path
) -> None:
    model = saved(tmp_path / "export", **settings)
    back = VQGAN.from_pretrained(round_trip(tmp_path / "export"))
    assert back.config == model.config
    assert back.fingerprint == model.fingerprint


LABELS = {"modality": {"name": "labels", "classes": 7}}
COORDINATES = CoordinatesCondition(11, [4, 4], 2)


@pytest.mark.parametrize(
    ("settings", "condition"),
    [
        ({"dropout_residual": 0.1}, None),
        ({"condition": ClassCondition(5), "order": "alternate"}, None),
        ({"condition": COORDINATES, "order": "spiral_out"}, None),
        ({"condition": ObjectCentersCondition(3, 12, 5, ["group"], 0.1)}, None),
        ({"order": "z_curve", "block": {"name": "gpt", "unmasked": 16}}, LABELS),
        ({"order": "random"}, {"modality": {"name": "depth"}}),
    ],
)
def test_a_transformer_comes_back_bit_for_bit_with_its_vqgans(
    settings: dict[str, Any],
    condition: dict[str, Any] | None,
    round_trip: Callable[..., Path],
    tmp_path: Path,
) -> None:
    vqgan = saved(tmp_path / "vqgan")
    options = ["--vqgan", tmp_path / "vqgan"]
    if condition is not None:
        second = saved(tmp_path / "second", **condition)
        settings = settings | {
            "condition": CodesCondition(12, [4, 4], second.tokenizer_fingerprint)
        }
        options += ["--condition-vqgan", tmp_path / "second"]
    model = gpt(tmp_path / "gpt", vqgan, **settings)
    folder = round_trip(tmp_path / "gpt", *options)
    assert VQGAN.from_pretrained(folder / "vqgan").fingerprint == vqgan.fingerprint
    if condition is not None:
        found = VQGAN.from_pretrained(folder / "condition_vqgan")
        assert (found.fingerprint, found.config) == (second.fingerprint, second.config)
    back = Transformer.from_pretrained(folder)
    assert back.config == model.config
    assert back.fingerprint == model.fingerprint


def test_names_shapes_masks_and_indices_are_the_originals(
    original: Any, tool: Callable[..., str], tmp_path: Path
) -> None:
    written = original.net2net(block=32) | original.condition(labels=5)
    written |= original.permuter(ORDERS["z_curve"]().places((4, 4)).tolist())
    for name in [name for name in written if name.endswith("mask")]:
        written[name][..., :16, :16] = 1
    torch.save({"state_dict": written}, tmp_path / "last.ckpt")
    options = ("--resolution", 8, "--heads", 2)
    tool(import_checkpoint, tmp_path / "last.ckpt", "--out", tmp_path / "in", *options)
    vqgans = ("--vqgan", tmp_path / "in" / "vqgan")
    vqgans += ("--condition-vqgan", tmp_path / "in" / "condition_vqgan")
    tool(export_model, tmp_path / "in", "--out", tmp_path / "t", "--format", "taming", *vqgans)
    contents = load(tmp_path / "t")
    assert contents.keys() == {"state_dict", "global_step"}
    assert contents["state_dict"].keys() == written.keys()
    for name, value in contents["state_dict"].items():
        if "colorize" in name:  # ours: the original draws them, for previews alone
            assert value.shape == written[name].shape
        else:
            assert torch.equal(value, written[name]), name


def test_the_first_stage_may_be_that_of_the_condition_too(
    round_trip: Callable[..., Path], tmp_path: Path
) -> None:
    vqgan = saved(tmp_path / "vqgan")
    lr = saved(tmp_path / "lr", modality={"name": "low_resolution"})
    condition = CodesCondition(12, [2, 2], lr.tokenizer_fingerprint)
    model = gpt(tmp_path / "gpt", vqgan, condition=condition)
    options = ("--vqgan", tmp_path / "vqgan", "--condition-vqgan", tmp_path / "lr")
    assert (
        Transformer.from_pretrained(round_trip(tmp_path / "gpt", *options)).config == model.config
    )
    params = yaml.safe_load((tmp_path / "taming" / "config.yaml").read_text())["model"]["params"]
    assert params["cond_stage_config"] == "__is_first_stage__"
    assert (params["cond_stage_key"], params["downsample_cond_size"]) == ("lr", 4)
    tensors = load(tmp_path / "taming")["state_dict"]
    name = "encoder.conv_in.weight"
    assert torch.equal(tensors[f"cond_stage_model.{name}"], tensors[f"first_stage_model.{name}"])


def test_the_yaml_file_names_the_classes_of_the_original(
    tool: Callable[..., str], tmp_path: Path
) -> None:
    targets = {}
    gumbel = {"name": "gumbel", "codes": 12, "dim": 4}
    labels = {"modality": {"name": "labels", "classes": 7}}
    for settings in ({}, labels, {"quantizer": gumbel}):
        saved(tmp_path / "export", **settings)
        tool(export_model, tmp_path / "export", "--out", tmp_path / "t", "--format", "taming")
        model = yaml.safe_load((tmp_path / "t" / "config.yaml").read_text())["model"]
        targets[model["target"].rpartition(".")[2]] = model["params"]
    assert targets.keys() == {"VQModel", "VQSegmentationModel", "GumbelVQ"}
    assert targets["VQSegmentationModel"]["n_labels"] == 7
    assert targets["VQModel"]["ddconfig"]["ch_mult"] == [1, 2]
    assert "temperature_scheduler_config" in targets["GumbelVQ"]
    assert load(tmp_path / "t")["state_dict"].keys() >= {"quantize.embed.weight"}


def test_label_maps_leave_with_the_colours_that_the_original_expects(
    tool: Callable[..., str], tmp_path: Path
) -> None:
    saved(tmp_path / "export", modality={"name": "labels", "classes": 7})
    tool(export_model, tmp_path / "export", "--out", tmp_path / "t", "--format", "taming")
    assert load(tmp_path / "t")["state_dict"]["colorize"].shape == (3, 7, 1, 1)


@pytest.mark.parametrize(
    "quantizer",
    [
        EMAQuantizerConfig(codes=12, dim=4, normalized=False),
        EMAQuantizerConfig(codes=12, dim=4),
        VectorQuantizerConfig(codes=12, dim=4, normalized=True),
    ],
)
def test_codebooks_of_averages_and_of_unit_length_leave_as_plain_ones_with_the_same_codes(
    quantizer: Any, tool: Callable[..., str], tmp_path: Path
) -> None:
    model = saved(tmp_path / "export", quantizer=quantizer).eval()
    tool(export_model, tmp_path / "export", "--out", tmp_path / "t", "--format", "taming")
    back = import_vqgan(load(tmp_path / "t")["state_dict"], {}, 8)
    latents = torch.randn(2, 4, 8, 8)
    with torch.no_grad():
        codes = model.quantize(latents).codes
        assert torch.equal(back.quantize(latents).codes, codes)
        torch.testing.assert_close(back.decode_codes(codes), model.decode_codes(codes))
    assert len(codes.unique()) > 2


def test_networks_that_the_original_has_not_are_refused(
    tool: Callable[..., str], tmp_path: Path
) -> None:
    VQGAN(tiny_networks(ViTConfig)).save_pretrained(tmp_path / "export")
    with pytest.raises(UserError, match="model=vit: the original has no such networks"):
        tool(export_model, tmp_path / "export", "--out", tmp_path / "out", "--format", "taming")
    assert not (tmp_path / "out").exists()


def test_quantizers_that_the_original_has_not_are_refused(
    tool: Callable[..., str], tmp_path: Path
) -> None:
    saved(tmp_path / "export", quantizer={"name": "ibq", "codes": 12, "dim": 4})
    with pytest.raises(UserError, match="the original has no such quantizer"):
        tool(export_model, tmp_path / "export", "--out", tmp_path / "t", "--format", "taming")
    assert not (tmp_path / "t").exists()


def test_a_transformer_leaves_with_the_vqgan_that_it_learned_from_only(
    tool: Callable[..., str], tmp_path: Path
) -> None:
    gpt(tmp_path / "gpt", saved(tmp_path / "vqgan"))
    arguments = (tmp_path / "gpt", "--out", tmp_path / "t", "--format", "taming")
    with pytest.raises(UserError, match="give it with --vqgan"):
        tool(export_model, *arguments)
    other = saved(tmp_path / "other", blocks=2)
    with pytest.raises(UserError, match=f"has the fingerprint {other.tokenizer_fingerprint}"):
        tool(export_model, *arguments, "--vqgan", tmp_path / "other")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"condition": ClassCondition(50), "condition_table": "own"}, "model.condition_table=own"),
        ({"condition": ClassCondition(5), "null_prefix": True}, "loss.condition_dropout"),
        (
            {"condition": SeveralConditions([ClassCondition(5)]), "condition_table": "own"},
            "model/condition=several",
        ),
        ({"condition": ObjectsCondition(2, 12, 2, ["occluded"])}, "flags=.*'occluded'"),
        ({"block": "llama"}, "model/block=llama"),
        ({"scheme": "masked"}, "model/scheme=masked"),
        ({"order": "rar"}, "model/order=rar"),
        ({"order": "z_curve", "grid": [4, 2]}, "model/order=z_curve: .* none for 4 x 2 codes"),
    ],
)
def test_what_has_no_place_in_the_originals_format_is_refused(
    settings: dict[str, Any], expected: str, tool: Callable[..., str], tmp_path: Path
) -> None:
    gpt(tmp_path / "gpt", saved(tmp_path / "vqgan"), **settings)
    arguments = (tmp_path / "gpt", "--out", tmp_path / "t", "--format", "taming")
    with pytest.raises(UserError, match=expected) as error:
        tool(export_model, *arguments, "--vqgan", tmp_path / "vqgan")
    assert "give" in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "t").exists()


def test_a_conditions_vqgan_is_asked_for_and_compared(
    tool: Callable[..., str], tmp_path: Path
) -> None:
    second = saved(tmp_path / "second", blocks=2)
    condition = CodesCondition(12, [4, 4], second.tokenizer_fingerprint)
    gpt(tmp_path / "gpt", saved(tmp_path / "vqgan"), condition=condition)
    arguments = [tmp_path / "gpt", "--out", tmp_path / "t", "--format", "taming"]
    arguments += ["--vqgan", tmp_path / "vqgan"]
    with pytest.raises(UserError, match="give it with --condition-vqgan"):
        tool(export_model, *arguments)
    with pytest.raises(UserError, match=f"learned the codes of {second.tokenizer_fingerprint}"):
        tool(export_model, *arguments, "--condition-vqgan", tmp_path / "vqgan")


def test_a_run_gives_its_export_and_its_step(tool: Callable[..., str], tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("run: {}\n")
    with pytest.raises(UserError, match="has no export and no checkpoint yet"):
        tool(export_model, run, "--out", tmp_path / "copy")
    model = saved(run / "export")
    world = World(0, 1, 0, torch.device("cpu"))
    checkpoints = Checkpoints(run / "checkpoints", world)
    checkpoints.write(checkpoints.begin(42, {}, {"images": 168}), GivenUp())
    tool(export_model, run, "--out", tmp_path / "copy")
    assert VQGAN.from_pretrained(tmp_path / "copy").fingerprint == model.fingerprint
    tool(export_model, run, "--out", tmp_path / "t", "--format", "taming")
    assert load(tmp_path / "t")["global_step"] == 42
    assert sorted(path.name for path in (tmp_path / "t").iterdir()) == ["config.yaml", "last.ckpt"]


class Averaged:
    """An engine of a model that was averaged: its weights are others."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def snapshot(self) -> Snapshot:
        pieces = []
        for stored in stored_parameters(self.model):
            value = stored.of(stored.parameter).detach().reshape(-1)
            pieces.append(Piece(f"average/{stored.name}", 0, value))
            pieces.append(Piece(f"weights/{stored.name}", 0, torch.zeros_like(value)))
        for name, value in self.model.named_buffers():
            pieces.append(Piece(f"buffers/{name}", 0, value.view(-1)))
        return Snapshot(pieces, {}, 0, 1)

    def load(self, folder: Path, name: str) -> None:
        raise AssertionError("is not loaded here")


@pytest.mark.parametrize("kind", ["vqgan", "transformer"])
def test_a_run_without_an_export_gives_the_model_of_its_newest_checkpoint(
    kind: str, tool: Callable[..., str], tmp_path: Path
) -> None:
    model: Any = saved(tmp_path / "vqgan", quantizer=EMAQuantizerConfig(codes=12, dim=8))
    if kind == "transformer":
        model = gpt(tmp_path / "gpt", model, condition=ClassCondition(5), order="z_curve")
    run = tmp_path / "run"
    checkpoints = Checkpoints(run / "checkpoints", World(0, 1, 0, torch.device("cpu")))
    draft = checkpoints.begin(42, {"network": Averaged(model)}, {"images": 168})
    meta = dataclasses.replace(
        draft.meta, exported="network", model=json.loads(json.dumps(model.canonical_config()))
    )
    checkpoints.write(dataclasses.replace(draft, meta=meta), GivenUp())
    (run / "config.yaml").write_text("run: {}\n")
    tool(export_model, run, "--out", tmp_path / "copy")
    assert type(model).from_pretrained(tmp_path / "copy").fingerprint == model.fingerprint
    saved(run / "export", blocks=2)
    tool(export_model, run, "--out", tmp_path / "again", "--from-checkpoint")
    assert type(model).from_pretrained(tmp_path / "again").fingerprint == model.fingerprint


@pytest.mark.parametrize("format", ["export", "taming"])
def test_a_full_disk_is_one_line_and_leaves_nothing(
    tool: Callable[..., str],
    tmp_path: Path,
    format: str,
    largest_file: Callable[[int], AbstractContextManager[None]],
) -> None:
    saved(tmp_path / "model")
    out = tmp_path / "out"
    with largest_file(2**15), pytest.raises(UserError, match=f"{out} cannot be written"):
        tool(export_model, tmp_path / "model", "--out", out, "--format", format)
    assert list(out.iterdir()) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"]


def test_what_is_no_model_is_named(tool: Callable[..., str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no export"):
        tool(export_model, tmp_path, "--out", tmp_path / "t")
    saved(tmp_path / "export")
    with pytest.raises(UserError, match="is the export itself"):
        tool(export_model, tmp_path / "export", "--out", tmp_path / "export")
