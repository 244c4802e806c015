"""Exports of a run: whole, loadable, replaced by the next."""

from pathlib import Path

import torch

from taming_dist.models.quantizers import EMAQuantizerConfig
from taming_dist.models.vqgan import VQGAN
from taming_dist.training.export import assemble, write_export
from tests.tiny_models import tiny_config

CONFIG = tiny_config(EMAQuantizerConfig(codes=8, dim=4), latent_channels=8)


def trained(seed: int) -> VQGAN:
    torch.manual_seed(seed)
    return VQGAN(CONFIG).eval()


def test_an_assembled_model_is_the_one_its_tensors_came_from() -> None:
    model = trained(0)
    twin = assemble(VQGAN, CONFIG, model.state_dict())
    images = torch.rand(1, 3, 8, 8)
    assert torch.equal(twin.encode(images), model.encode(images))
    assert not twin.training


def test_a_written_export_loads_and_the_next_replaces_it(tmp_path: Path) -> None:
    for seed in (0, 1):
        model = trained(seed)
        write_export(VQGAN, CONFIG, model.state_dict(), tmp_path / "run" / "export")
        assert VQGAN.from_pretrained(tmp_path / "run" / "export").fingerprint == model.fingerprint
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["export"]
