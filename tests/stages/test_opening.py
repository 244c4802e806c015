"""run.init: a run starts from the weights of an export, if it is one of the same model."""

import io
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from taming_dist.data.batching import BatchSizes
from taming_dist.data.reader import ImagesConfig, Reader, Reading
from taming_dist.data.streaming import StreamingReader
from taming_dist.engine.settings import EngineConfig
from taming_dist.engine.world import World
from taming_dist.errors import UserError
from taming_dist.launch import ALONE
from taming_dist.models.discriminators import PatchGAN, PatchGANConfig
from taming_dist.models.prior.conditions import ClassCondition
from taming_dist.models.prior.transformer import Transformer, TransformerConfig
from taming_dist.models.vqgan import VQGAN, VQGANConfig
from taming_dist.stages import STAGES
from taming_dist.stages.context import Context
from taming_dist.stages.images import open_training, resolve_images
from taming_dist.stages.interface import Config, RunConfig, Start
from taming_dist.stages.opening import discriminator_weights, initial_weights
from taming_dist.stages.prior import TokenLossConfig, TransformerRecipe
from taming_dist.stages.vqgan import VQGANLossConfig
from taming_dist.training.optimization import OptimConfig
from tests.data.shard_files import write_noise, writing_shards
from tests.tiny_models import tiny_config

QUANTIZER = {"name": "vector", "codes": 12, "dim": 4, "legacy": True}
HERE = World(0, 1, 0, torch.device("cpu"))


def vqgan(**settings: Any) -> VQGANConfig:
    return tiny_config(**{"quantizer": QUANTIZER, "resolution": 32} | settings)


def gpt(**settings: Any) -> TransformerConfig:
    defaults = {"vocabulary": 12, "grid": [2, 2], "layers": 1, "heads": 2, "width": 8}
    return TransformerConfig(**defaults | settings)


@pytest.fixture
def export(tmp_path: Path) -> Path:
    torch.manual_seed(7)
    VQGAN(vqgan()).save_pretrained(tmp_path / "export")
    return tmp_path / "export"


def test_training_starts_from_the_weights_of_the_export(export: Path, tmp_path: Path) -> None:
    """One real step at learning rate 0, under the ZeRO stage that cuts the weights up."""
    write_noise(tmp_path / "data", 2, 32)
    judge = PatchGAN(PatchGANConfig(channels=8, layers=2), 3).state_dict()
    save_file(judge, export / "discriminator.safetensors")
    command = [sys.executable, "-m", "taming_dist.train", "+experiment=flickr", "engine=zero3"]
    command += ["run.name=tuned", f"run.init={export}", "train.steps=1", "optim.base_lr=0"]
    command += ["data.train=data", "data.val=data", "data.size=32", "data.global_batch=2"]
    command += ["data.micro_batch=2", "data.lanes=1", "data.block=1", "log.wandb=disabled"]
    command += ["model.resolution=32", "model.channels=32", "model.multipliers=[1,1]"]
    command += ["model.blocks=1", "model.attention_resolutions=[]", "model.latent_channels=4"]
    command += ["model.quantizer.codes=12", "model.quantizer.dim=4", "model.quantizer.legacy=true"]
    command += ["loss.terms.perceptual.net=alex", "loss.terms.perceptual.weights=random"]
    command += ["train.preview_images=1"]
    command += ["loss.discriminator.channels=8", "loss.discriminator.layers=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    before = VQGAN.from_pretrained(export).state_dict()
    after = VQGAN.from_pretrained(tmp_path / "outputs" / "tuned" / "export").state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_transformer_starts_from_the_weights_of_the_export(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(7)
    model = Transformer(gpt(vqgan_fingerprint="of other codes"))
    model.save_pretrained(tmp_path / "export")
    initial = initial_weights(str(tmp_path / "export"), Transformer, gpt())
    monkeypatch.setattr(
        "taming_dist.stages.context.Engine",
        lambda network, *_, **__: SimpleNamespace(module=network),
    )
    context = Context(OptimConfig(lr=1e-3), EngineConfig(), HERE, micro_batch=1)
    recipe = TransformerRecipe(gpt(), TokenLossConfig(), context, initial=initial)
    network = recipe.transformer.module
    for name, value in model.state_dict().items():
        assert torch.equal(network.state_dict()[name], value), name


def test_a_null_prefix_is_added_to_an_export_without_one_and_never_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(7)
    classes = {"condition": ClassCondition(3)}
    plain, guided = (gpt(**classes, null_prefix=has) for has in (False, True))
    for name, config in (("plain", plain), ("guided", guided)):
        Transformer(config).save_pretrained(tmp_path / name)
    initial = initial_weights(str(tmp_path / "plain"), Transformer, guided)
    assert initial is not None
    monkeypatch.setattr(
        "taming_dist.stages.context.Engine",
        lambda network, *_, **__: SimpleNamespace(module=network),
    )
    context = Context(OptimConfig(lr=1e-3), EngineConfig(), HERE, micro_batch=1)
    loss = TokenLossConfig(condition_dropout=0.1)
    found = TransformerRecipe(guided, loss, context, initial=initial).network.state_dict()
    assert 0 < found.pop("null_emb").std() < 0.1
    assert found.keys() == initial.keys()
    assert all(torch.equal(found[name], initial[name]) for name in found)
    with pytest.raises(UserError, match="guided has null_emb, .*: set model.null_prefix=true or"):
        initial_weights(str(tmp_path / "guided"), Transformer, plain)


def test_a_discriminator_beside_the_export_is_taken_and_checked(
    export: Path, tmp_path: Path
) -> None:
    config = PatchGANConfig(channels=8)
    assert discriminator_weights(str(export), config, 3) is None
    kept = PatchGAN(config, 3).state_dict()
    save_file(kept, export / "discriminator.safetensors")
    found = discriminator_weights(str(export), config, 3)
    assert found is not None
    assert all(torch.equal(found[name], kept[name]) for name in kept)
    with pytest.raises(UserError, match=r"remove it to start anew.*main\.3\.num_batches_tracked"):
        discriminator_weights(str(export), PatchGANConfig(channels=8, norm="group"), 3)
    assert discriminator_weights(str(export), None, 3) is None
    assert discriminator_weights("", config, 3) is None


def test_without_run_init_nothing_is_loaded(tmp_path: Path) -> None:
    assert initial_weights("", VQGAN, vqgan()) is None


def test_how_a_codebook_begins_and_is_revived_may_be_other_than_in_the_export(
    tmp_path: Path,
) -> None:
    """The codebook itself stays: it is not begun from data again."""
    plain, revived = vqgan(), vqgan(quantizer=QUANTIZER | {"initial": "data", "revive_below": 0.1})
    for number, (before, after) in enumerate([(plain, revived), (revived, plain)]):
        folder = str(tmp_path / str(number))
        exported = VQGAN(before)
        for name, tensor in exported.state_dict().items():
            if name in VQGAN.steering:
                tensor.fill_(1)  # as after training
        exported.save_pretrained(folder)
        found = initial_weights(folder, VQGAN, after)
        assert found is not None
        model = VQGAN(after)
        model.load_state_dict(found)
        assert not model.quantize.start.pending()
        kept = VQGAN.from_pretrained(folder).state_dict()["quantize.embedding.weight"]
        assert torch.equal(found["quantize.embedding.weight"], kept)


def test_where_codes_are_to_stay_their_fingerprint_does_and_the_model_is_described_alike(
    export: Path,
) -> None:
    other = vqgan(quantizer=QUANTIZER | {"beta": 0.5})
    assert initial_weights(str(export), VQGAN, other) is not None
    assert initial_weights(str(export), VQGAN, vqgan(), same_codes=True) is not None
    with pytest.raises(UserError, match=r"has model.quantizer.beta=0.25 and this run 0.5: set it"):
        initial_weights(str(export), VQGAN, other, same_codes=True)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"blocks": 2}, r"lacks encoder\.down\.0\.block\.1"),
        ({"attention_resolutions": [16]}, r"lacks encoder\.down\.1\.attn\.0"),
        ({"latent_channels": 8}, r"has other sizes of encoder\.conv_out\.weight"),
        ({"quantizer": QUANTIZER | {"normalized": True}}, r"model\.quantizer\.normalized=False"),
        ({"quantizer": QUANTIZER | {"codes": 24}}, r"model\.quantizer\.codes=12 and this run 24"),
    ],
)
def test_weights_of_another_vqgan_are_refused(
    settings: dict[str, Any], expected: str, export: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=f"run.init={export} .*{expected}"):
        initial_weights(str(export), VQGAN, vqgan(**settings))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"heads": 4}, r"model\.heads=2 and this run 4"),
        ({"condition": ClassCondition(3)}, r"model\.condition=none and this run class"),
        ({"layers": 2}, r"lacks blocks\.1\.ln1\.weight"),
    ],
)
def test_weights_of_another_transformer_are_refused(
    settings: dict[str, Any], expected: str, tmp_path: Path
) -> None:
    Transformer(gpt()).save_pretrained(tmp_path / "export")
    folder = str(tmp_path / "export")
    with pytest.raises(UserError, match=expected):
        initial_weights(folder, Transformer, gpt(**settings))


def test_a_table_that_is_shared_does_not_become_one_of_the_conditions_own(tmp_path: Path) -> None:
    classes = {"condition": ClassCondition(3)}
    Transformer(gpt(**classes)).save_pretrained(tmp_path / "export")
    folder = str(tmp_path / "export")
    expected = r"model\.condition_table=shared and this run own: set it so"
    with pytest.raises(UserError, match=expected):
        initial_weights(folder, Transformer, gpt(**classes, condition_table="own"))
    assert initial_weights(folder, Transformer, gpt(**classes)) is not None


def test_what_is_no_export_of_this_stage_is_named_with_the_key(
    export: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"run\.init: .* is an export of a vqgan"):
        initial_weights(str(export), Transformer, gpt())
    with pytest.raises(UserError, match=r"run\.init: .*no such export"):
        initial_weights(str(tmp_path / "a" / "b" / "c"), VQGAN, vqgan())


def test_training_data_are_shards_a_mixture_or_with_streaming_what_has_no_index(
    tmp_path: Path,
) -> None:
    with writing_shards(tmp_path, "a", 4) as write:
        write("0", {"png": b""})
    data = ImagesConfig(train=str(tmp_path), micro_batch=2, size=8, lanes=1, block=1)

    def opened() -> Any:
        return open_training(data, Reading(data.preprocess(), data.micro_batch))

    for train in (str(tmp_path), [str(tmp_path)], {"a": {"shards": str(tmp_path)}}):
        data.train = train
        assert isinstance(opened(), Reader)
    data.streaming, data.train = True, f"{tmp_path}/*.tar"
    assert isinstance(opened(), StreamingReader)
    data.train, data.val = "pipe:cat a.tar", {"a": {"shards": str(tmp_path)}}
    with pytest.raises(UserError, match=r"data\.train: 'pipe:cat a\.tar' .*data\.allow_pipe=true"):
        opened()
    with pytest.raises(UserError, match=r"data\.val: .* give a list of specs, not a mixture"):
        resolve_images(data, "val")


def test_the_first_stage_needs_no_classes(tmp_path: Path) -> None:
    with writing_shards(tmp_path / "data", "images", 4) as write:
        for number, cls in enumerate((b"cat", b"1.0", b"", b"-1")):
            file = io.BytesIO()
            Image.new("RGB", (32, 32), (number, 0, 0)).save(file, "PNG")
            write(f"{number}", {"png": file.getvalue(), "cls": cls})
    shards = str(tmp_path / "data")
    data = ImagesConfig(shards, shards, global_batch=4, micro_batch=4, size=32, lanes=1, block=4)
    config = Config(run=RunConfig(name="a"), data=data, model=vqgan())
    config.loss = VQGANLossConfig()
    start = Start(ALONE, BatchSizes(4, 1, 4, 1), tmp_path / "run")
    opened = STAGES["vqgan"].open_data(config, start).data
    batch = next(opened.train.batches(0))
    assert sorted(batch.keys) == ["0", "1", "2", "3"]
    assert batch.classes is None
    assert opened.train.num_bad == 0
