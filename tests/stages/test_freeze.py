"""train.freeze: parts of an export stay as they are while the rest is trained on."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from taming_dist.errors import UserError
from taming_dist.generation.generator import check_pair
from taming_dist.models.prior.transformer import Transformer, TransformerConfig
from taming_dist.models.quantizers import EMAQuantizerConfig
from taming_dist.models.vqgan import VQGAN
from taming_dist.stages.counting import generator_flops
from tests.data.shard_files import write_noise
from tests.tiny_models import tiny_config

pytestmark = pytest.mark.slow

MODEL = tiny_config(EMAQuantizerConfig(codes=12, dim=4), 32)
SETTINGS = (
    "+experiment=flickr model/quantizer=ema run.name=tuned data.train=data data.val=data "
    "data.size=32 data.global_batch=4 data.micro_batch=2 data.lanes=4 data.block=1 "
    "log.wandb=disabled model.resolution=32 model.channels=32 model.multipliers=[1,1] "
    "model.blocks=1 model.attention_resolutions=[] model.latent_channels=4 "
    "model.quantizer.codes=12 model.quantizer.dim=4 loss.terms.perceptual.net=alex "
    "loss.terms.perceptual.weights=random loss.discriminator.channels=8 "
    "loss.discriminator.layers=2 loss.disc_start=1 optim.base_lr=null optim.lr=1e-3 "
    "optim.ema_half_life=8 train.preview_images=1"
)


def train(folder: Path, *overrides: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "taming_dist.train", *SETTINGS.split(), *overrides]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def images() -> torch.Tensor:
    return torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(3)) * 2 - 1


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export, images, and what ZeRO 3 made of the export's decoder in two runs, one of which was
    resumed without the export."""
    folder = tmp_path_factory.mktemp("freeze")
    torch.manual_seed(7)
    VQGAN(MODEL).save_pretrained(folder / "export")
    write_noise(folder / "data", 8, 32)
    command = ["engine=zero3", "engine.persist_below=0", "train.freeze=[encoder,quantizer]"]
    command += ["train.steps=4", "train.checkpoint_every=2"]
    done = train(folder, *command, "run.init=export", "run.dir=whole")
    assert done.returncode == 0, done.stderr[-3000:]
    shutil.copytree(folder / "whole", folder / "resumed")
    shutil.rmtree(folder / "resumed" / "export")
    shutil.rmtree(max((folder / "resumed" / "checkpoints").iterdir()))
    done = train(folder, *command, "run.init=gone", "run.dir=resumed")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "resumed" in done.stdout
    return folder


def test_a_decoder_is_trained_on_and_the_codes_stay_to_the_bit(folder: Path) -> None:
    before, after = (VQGAN.from_pretrained(folder / name) for name in ("export", "whole/export"))
    old, new = before.state_dict(), after.state_dict()
    changed = {name.split(".")[0] for name in old if not torch.equal(old[name], new[name])}
    assert changed == {"decoder", "post_quant_conv"}
    codes = before.encode(images())
    assert torch.equal(after.encode(images()), codes)
    assert not torch.equal(after.decode_codes(codes), before.decode_codes(codes))


def test_codes_and_transformers_of_the_old_export_are_those_of_the_new_one(folder: Path) -> None:
    before, after = (VQGAN.from_pretrained(folder / name) for name in ("export", "whole/export"))
    assert after.tokenizer_fingerprint == before.tokenizer_fingerprint
    assert after.fingerprint != before.fingerprint
    assert after.wrote(before.tokenizer_fingerprint)
    assert before.wrote(before.fingerprint)  # as shards before there were two say it
    assert not after.wrote(before.fingerprint)
    with torch.no_grad():
        before.encoder.conv_in.bias += 1
    assert not after.wrote(before.tokenizer_fingerprint)


def test_a_run_resumes_without_the_export_that_it_started_from(folder: Path) -> None:
    """Also the discriminator, which lies beside the export, is the same to the bit."""
    for name in ("model.safetensors", "discriminator.safetensors"):
        whole, resumed = (load_file(folder / run / "export" / name) for run in ("whole", "resumed"))
        assert whole.keys() == resumed.keys()
        assert [key for key in whole if not torch.equal(whole[key], resumed[key])] == []


def test_a_transformer_of_the_old_codes_samples_with_the_new_decoder(folder: Path) -> None:
    before, after = (VQGAN.from_pretrained(folder / name) for name in ("export", "whole/export"))
    config = TransformerConfig(vocabulary=12, grid=[2, 2], layers=1, heads=2, width=8)
    config.vqgan_fingerprint = before.tokenizer_fingerprint
    check_pair(Transformer(config), after)
    with torch.no_grad():
        after.quant_conv.bias += 1
    with pytest.raises(UserError, match="its fingerprint is"):
        check_pair(Transformer(config), after)


def test_what_is_frozen_costs_no_backward_pass() -> None:
    whole, decoder = (
        generator_flops(MODEL, 32),
        generator_flops(MODEL, 32, ["encoder", "quantizer"]),
    )
    assert decoder.forward == whole.forward
    assert 0.4 * whole.backward < decoder.backward < 0.7 * whole.backward
