"""Exports: what is written is what is read, fingerprints tell models apart, faults are named."""

import json
from pathlib import Path

import pytest
import torch

from taming_dist.errors import UserError
from taming_dist.models.export import read_fingerprint, read_kind
from taming_dist.models.prior.transformer import Transformer, TransformerConfig
from taming_dist.models.quantizers import EMAQuantizerConfig
from taming_dist.models.vqgan import VQGAN
from tests.tiny_models import tiny_config


def tiny(seed: int = 0) -> VQGAN:
    torch.manual_seed(seed)
    return VQGAN(tiny_config(EMAQuantizerConfig(codes=8, dim=4), latent_channels=8))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny().save_pretrained(tmp_path / "export")
    return tmp_path / "export"


def test_what_is_read_is_what_was_written(folder: Path, capsys: pytest.CaptureFixture) -> None:
    model, read = tiny(), VQGAN.from_pretrained(folder)
    names = {path.name for path in folder.iterdir()}
    assert names == {"README.md", "config.json", "model.safetensors"}
    assert read.config == model.config
    assert isinstance(read.config.quantizer, EMAQuantizerConfig)
    assert read.fingerprint == model.fingerprint
    assert not read.training
    assert capsys.readouterr() == ("", "")


def test_the_fingerprint_changes_with_any_tensor_and_with_the_configuration() -> None:
    model = tiny()
    before = model.fingerprint
    assert len(before) == 64
    model.quantize.entries[3, 1] += 1e-6
    after = model.fingerprint
    model.config.resolution = 16
    assert len({before, after, model.fingerprint, tiny(seed=1).fingerprint}) == 4


def test_the_fingerprint_of_an_export_is_known_without_building_the_model(
    folder: Path, tmp_path: Path
) -> None:
    assert read_fingerprint(str(folder)) == VQGAN.from_pretrained(folder).fingerprint
    sizes = {"vocabulary": 8, "grid": [2, 2], "layers": 1, "heads": 1, "width": 8}
    Transformer(TransformerConfig(**sizes)).save_pretrained(tmp_path / "prior")
    read = Transformer.from_pretrained(tmp_path / "prior")
    assert read_fingerprint(str(tmp_path / "prior")) == read.fingerprint
    (folder / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(UserError, match=r"model\.safetensors cannot be read"):
        read_fingerprint(str(folder))


def test_a_folder_that_is_no_export_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such export folder"):
        VQGAN.from_pretrained(tmp_path / "nowhere" / "at" / "all")
    with pytest.raises(UserError, match=r"is no export, it has no config\.json: name a"):
        VQGAN.from_pretrained(tmp_path)
    with pytest.raises(UserError, match="is no export, there is no such folder: name a folder"):
        read_kind(str(tmp_path / "nowhere"))
    (tmp_path / "config.json").write_text('{"kind"')
    with pytest.raises(UserError, match=r"config\.json is none of an export \(Expecting"):
        VQGAN.from_pretrained(tmp_path)


def test_an_export_of_another_kind_is_refused(tmp_path: Path) -> None:
    model = Transformer(TransformerConfig(vocabulary=8, grid=[2, 2], layers=1, heads=1, width=8))
    model.save_pretrained(tmp_path)
    assert read_kind(str(tmp_path)) == "transformer"
    with pytest.raises(UserError, match="is an export of a transformer, but a vqgan is needed"):
        VQGAN.from_pretrained(tmp_path)


def test_a_missing_or_cut_file_of_tensors_is_named(folder: Path) -> None:
    tensors = folder / "model.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
        VQGAN.from_pretrained(folder)
    tensors.unlink()
    with pytest.raises(UserError, match=r"has no model\.safetensors"):
        VQGAN.from_pretrained(folder)


def test_tensors_of_another_shape_are_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["quantizer"]["codes"] = 9
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"damaged or does not fit config\.json"):
        VQGAN.from_pretrained(folder)
