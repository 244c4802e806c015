"""Checkpoints in the original's layout become exports that every command can use.

The layout is written down by hand in conftest.py: names and shapes, not taken from our models.
"""

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from taming_dist import VQGAN
from taming_dist.errors import UserError
from taming_dist.models.discriminators import PatchGAN, PatchGANConfig
from taming_dist.models.modalities import Depth, LabelMap
from taming_dist.taming_compat.files import read_tensors
from taming_dist.taming_compat.first_stage import import_vqgan, infer, set_aside
from taming_dist.training.export import check_tensors
from tests.tools.conftest import describe

TOOL = Path(__file__).parents[2] / "tools" / "import_checkpoint.py"
import_checkpoint = runpy.run_path(str(TOOL))["main"]

DDCONFIG = {
    "double_z": False,
    "z_channels": 8,
    "resolution": 64,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 32,
    "ch_mult": [1, 2],
    "num_res_blocks": 1,
    "attn_resolutions": [32, 16],
    "dropout": 0.1,
}


# First stages


def test_a_vqgan_keeps_every_tensor_and_its_codes_work(
    original: Any, convert: Callable[..., str], tmp_path: Path
) -> None:
    tensors = original.vqmodel()
    said = convert(tensors)
    model = VQGAN.from_pretrained(tmp_path / "out")
    state = model.state_dict()
    assert state.keys() == tensors.keys()
    assert all(torch.equal(state[name], tensors[name]) for name in tensors)
    assert model.config.quantizer.legacy
    assert "VQGANConfig" in said
    with torch.no_grad():
        codes = model.encode(torch.randn(2, 3, 8, 12))
        assert model.decode_codes(codes).shape == (2, 3, 8, 12)
    assert codes.shape == (2, 4, 6)


def test_architecture_is_read_off_the_shapes(original: Any) -> None:
    sizes = {"images": 1, "ch": 64, "ch_mult": (1, 2, 1), "blocks": 2, "attended": (0, 2)}
    model = import_vqgan(original.vqmodel(**sizes, z=6, dim=3, codes=9), {})
    config = model.config
    assert (config.modality, config.channels, config.blocks) == (Depth(), 64, 2)
    assert list(config.multipliers) == [1, 2, 1]
    assert list(config.attention_resolutions) == [256, 64]
    assert (config.latent_channels, config.quantizer.dim, config.vocabulary) == (6, 3, 9)


def test_the_yaml_file_adds_what_shapes_do_not_say(
    original: Any, convert: Callable[..., str], tmp_path: Path
) -> None:
    path = describe(tmp_path, {"n_embed": 12, "embed_dim": 4, "ddconfig": DDCONFIG})
    convert(original.vqmodel(), "--config", path)
    config = VQGAN.from_pretrained(tmp_path / "out").config
    assert (config.resolution, config.dropout) == (64, 0.1)
    assert list(config.attention_resolutions) == [32]


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"n_embed": 1024}, "n_embed is 1024 in the YAML file and 12 in the checkpoint"),
        ({"ddconfig": DDCONFIG | {"ch_mult": [1, 1]}}, r"ch_mult is \[1, 1\]"),
        ({"ddconfig": DDCONFIG | {"attn_resolutions": []}}, r"attn_resolutions is \[\]"),
        ({"ddconfig": DDCONFIG | {"resolution": "64"}}, "resolution in the YAML file is '64'"),
        ({"ddconfig": [1]}, "ddconfig in the YAML file is no mapping"),
    ],
)
def test_a_yaml_file_of_another_model_is_refused(
    params: dict[str, Any],
    expected: str,
    original: Any,
    convert: Callable[..., str],
    tmp_path: Path,
) -> None:
    with pytest.raises(UserError, match=expected):
        convert(original.vqmodel(), "--config", describe(tmp_path, params))
    assert not (tmp_path / "out").exists()


def test_losses_and_preview_colours_are_left_out_and_said(
    original: Any, convert: Callable[..., str], tmp_path: Path
) -> None:
    beside = original.fill(original.discriminator() | original.perceptual())
    labels = original.vqmodel(images=5) | {"colorize": torch.zeros(3, 5, 1, 1)}
    said = convert(labels | beside)
    assert "22 tensors loss.discriminator.*" in said
    assert "33 tensors loss.perceptual_loss.*" in said
    assert "1 tensors colorize" in said
    assert VQGAN.from_pretrained(tmp_path / "out").config.modality == LabelMap(5)


def test_the_discriminator_is_kept_where_it_is_asked_for(
    original: Any, convert: Callable[..., str], tmp_path: Path
) -> None:
    tensors = original.vqmodel()
    with pytest.raises(UserError, match=r"has no loss\.discriminator\.\*"):
        convert(tensors, "--discriminator")
    beside = original.fill(original.discriminator(8))
    convert(tensors | beside, "--discriminator")
    state = load_file(tmp_path / "out" / "discriminator.safetensors")
    ours = PatchGAN(PatchGANConfig(channels=8), 3)
    ours.load_state_dict(state)
    assert torch.equal(ours.main[11].bias, beside["loss.discriminator.main.11.bias"])


def test_a_codebook_of_averages_and_one_of_gumbels(original: Any) -> None:
    tensors = original.vqmodel(z=4)
    entries = tensors.pop("quantize.embedding.weight")
    averaged = {"weight": entries, "cluster_size": torch.ones(12), "embed_avg": 2 * entries}
    model = import_vqgan(
        tensors | {f"quantize.embedding.{name}": value for name, value in averaged.items()}, {}
    )
    assert model.config.quantizer.name == "ema"
    assert torch.equal(model.quantize.lookup(torch.tensor([[[3]]]))[0, :, 0, 0], entries[3])
    drawn = {"proj.weight": torch.randn(12, 4, 1, 1), "proj.bias": torch.zeros(12)}
    drawn["embed.weight"] = entries
    named = {f"quantize.{name}": value for name, value in drawn.items()}
    model = import_vqgan(tensors | named, {"kl_weight": 5e-4})
    assert model.config.quantizer.kl_weight == 5e-4
    with torch.no_grad():
        z = torch.randn(1, 4, 2, 2)
        expected = torch.nn.functional.conv2d(z, drawn["proj.weight"]).argmax(1)
        assert torch.equal(model.quantize(z).codes, expected)


def test_of_a_remapped_codebook_the_used_codes_stay_under_their_new_numbers(
    original: Any,
) -> None:
    tensors = original.vqmodel()
    model = import_vqgan(tensors | {"quantize.used": torch.tensor([7, 2, 9])}, {"n_embed": 12})
    assert model.config.vocabulary == 3
    entries = model.quantize.lookup(torch.arange(3).view(1, 1, 3))[0, :, 0].T
    assert torch.equal(entries, tensors["quantize.embedding.weight"][[7, 2, 9]])


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda t: t.pop("encoder.mid.block_1.conv1.bias"), "lacks encoder.mid.block_1.conv1.bias"),
        (lambda t: t.update({"encoder.temb.weight": t["quant_conv.bias"]}), "encoder.temb.weight"),
        (lambda t: t.pop("encoder.conv_in.weight"), "encoder.conv_in.weight is missing"),
        (lambda t: t.pop("quantize.embedding.weight"), "no codebook is known"),
        (lambda t: t.update({"quantize.used": torch.tensor([3, 12])}), "used codes must be"),
        (
            lambda t: t.update({"decoder.conv_out.weight": torch.zeros(1, 32, 3, 3)}),
            r"decoder.conv_out.weight \(\[1, 32, 3, 3\] instead of \[3, 32, 3, 3\]\)",
        ),
    ],
)
def test_missing_unknown_and_unfit_tensors_are_named(
    change: Callable[[dict], Any],
    expected: str,
    original: Any,
    convert: Callable[..., str],
    tmp_path: Path,
) -> None:
    tensors = original.vqmodel()
    change(tensors)
    with pytest.raises(UserError, match=expected):
        convert(tensors)
    assert not (tmp_path / "out").exists()


# The paper's f16 model with 1024 codes, without memory for its numbers


@pytest.fixture
def f16(original: Any) -> dict[str, Tensor]:
    """All of a training checkpoint of conf/model/f16.yaml, on the meta device."""
    shapes = original.first_stage(3, 128, (1, 1, 2, 2, 4), 2, (4,), 256, 256, 1024)
    shapes |= original.discriminator(64) | original.perceptual()
    return {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}


def test_a_full_f16_checkpoint_has_398_tensors_that_are_all_known(f16: dict[str, Tensor]) -> None:
    assert len(f16) == 398
    kept, counts = set_aside(f16)
    assert sum(counts.values()) == 55
    config = infer(kept, "vector", {}, None)
    assert list(config.attention_resolutions) == [16]
    assert (config.factor, config.vocabulary, config.latent_channels) == (16, 1024, 256)
    with torch.device("meta"):
        check_tensors(VQGAN(config).state_dict(), kept, "f16")
        ours = PatchGAN(PatchGANConfig(), 3).state_dict()
    theirs = {
        name.removeprefix("loss.discriminator."): value
        for name, value in f16.items()
        if name.startswith("loss.discriminator.")
    }
    check_tensors(ours, theirs, "its discriminator")


def test_the_networks_are_as_large_as_the_originals(f16: dict[str, Tensor]) -> None:
    def millions(prefix: str) -> float:
        counted = [value for name, value in f16.items() if name.startswith(prefix)]
        return sum(value.numel() for value in counted) / 1e6

    statistics = 2 * (128 + 256 + 512) + 3  # of BatchNorm, which are not parameters
    assert millions("encoder.") == pytest.approx(29.298, abs=5e-4)
    assert millions("decoder.") == pytest.approx(42.450, abs=5e-4)
    assert millions("loss.discriminator.") - statistics / 1e6 == pytest.approx(2.767, abs=2e-3)
    assert millions("quant") + millions("post_quant") == pytest.approx(0.394, abs=5e-4)


@pytest.mark.parametrize(
    ("ch_mult", "attended", "dim", "codes", "resolutions"),
    [
        ((1, 2, 4), (), 3, 8192, []),
        ((1, 2, 2, 4), (3,), 4, 16384, [32]),
        ((1, 1, 2, 2, 4), (4,), 8, 16384, [16]),
    ],
    ids=["f4", "f8", "f16"],
)
def test_first_stages_of_latent_diffusion_have_the_same_layout(
    ch_mult: tuple[int, ...],
    attended: tuple[int, ...],
    dim: int,
    codes: int,
    resolutions: list[int],
    original: Any,
) -> None:
    shapes = original.first_stage(3, 128, ch_mult, 2, attended, dim, dim, codes)
    tensors = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    averages = {"model_ema.decay": torch.ones(()), "model_ema.encoderconv_inbias": torch.ones(1)}
    kept, counts = set_aside(tensors | averages)
    assert counts == {"model_ema.": 2}
    said = {"ch_mult": list(ch_mult), "attn_resolutions": resolutions, "resolution": 256}
    description = {"embed_dim": dim, "n_embed": codes, "ddconfig": said | {"z_channels": dim}}
    config = infer(kept, "vector", description, None)
    assert (config.factor, config.latent_channels) == (2 ** (len(ch_mult) - 1), dim)
    assert list(config.attention_resolutions) == resolutions
    with torch.device("meta"):
        check_tensors(VQGAN(config).state_dict(), kept, "latent diffusion")


# Files


class Attack:
    def __reduce__(self) -> tuple:
        return print, ("it was run",)


def test_nothing_but_tensors_is_unpickled(
    original: Any,
    convert: Callable[..., str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(UserError, match=r"holds more than tensors \(.*print\).*state_dict alone"):
        convert(original.vqmodel(), callbacks=Attack())
    assert "it was run" not in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("contents", "said"),
    [
        (b"", r"last\.ckpt is empty: fetch it again"),
        (b"PK\x03\x04" + bytes(100), r"last\.ckpt is cut off or damaged: fetch it again"),
        (b"no pickle at all", r"last\.ckpt is not a PyTorch checkpoint: fetch it again"),
    ],
    ids=["empty", "cut", "other"],
)
def test_what_is_no_checkpoint_is_not_said_to_hold_forbidden_objects(
    tmp_path: Path, contents: bytes, said: str
) -> None:
    (tmp_path / "last.ckpt").write_bytes(contents)
    with pytest.raises(UserError, match=said):
        read_tensors(tmp_path / "last.ckpt")


def test_lightnings_callbacks_are_passed_over(
    original: Any, convert: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Old checkpoints key their callbacks' states by class, of a package that is not there."""
    module = type(pytest)("pytorch_lightning.callbacks.model_checkpoint")
    module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": module.__name__})
    with monkeypatch.context() as patched:
        for name in ("pytorch_lightning", "pytorch_lightning.callbacks", module.__name__):
            patched.setitem(__import__("sys").modules, name, module)
        path = tmp_path / "last.ckpt"
        contents = {"callbacks": {module.ModelCheckpoint: {"best_model_path": "x"}}}
        torch.save(contents | {"state_dict": original.vqmodel()}, path)
    import_checkpoint([str(path), "--out", str(tmp_path / "out")])
    assert VQGAN.from_pretrained(tmp_path / "out").config.vocabulary == 12


def test_safetensors_and_bare_state_dicts_are_read_and_half_precision_becomes_full(
    original: Any, tool: Callable[..., str], tmp_path: Path
) -> None:
    tensors = original.vqmodel()
    save_file(tensors, tmp_path / "model.safetensors")
    torch.save({name: value.half() for name, value in tensors.items()}, tmp_path / "model.pt")
    found = []
    for name in ("model.safetensors", "model.pt"):
        tool(import_checkpoint, tmp_path / name, "--out", tmp_path / "out")
        found.append(VQGAN.from_pretrained(tmp_path / "out").state_dict()["quant_conv.weight"])
    assert torch.equal(found[0], tensors["quant_conv.weight"])
    assert found[1].dtype == torch.float32
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "contents"),
    [
        ("gone.ckpt", None),
        ("text.ckpt", b"not a checkpoint"),
        ("text.safetensors", b"not a checkpoint"),
    ],
)
def test_what_is_no_checkpoint_is_named(
    name: str, contents: bytes | None, tool: Callable[..., str], tmp_path: Path
) -> None:
    path = tmp_path / name
    if contents is not None:
        path.write_bytes(contents)
    with pytest.raises(UserError, match=name):
        tool(import_checkpoint, path, "--out", tmp_path / "out")


def test_a_checkpoint_that_was_cut_is_named(
    original: Any, convert: Callable[..., str], tool: Callable[..., str], tmp_path: Path
) -> None:
    convert(original.vqmodel())
    path = tmp_path / "last.ckpt"
    path.write_bytes(path.read_bytes()[:10000])
    with pytest.raises(UserError, match="last.ckpt"):
        tool(import_checkpoint, path, "--out", tmp_path / "out")
