"""Runs the commands of docs/extending.md, given on stdin, on the package that has its examples.

Training is composed and checked as typed, shrunk, and goes one step on a plain engine; what each
kind of variant promises is then looked at.
"""

import runpy
import shlex
import sys
from pathlib import Path

import torch
from hydra.core.config_store import ConfigStore
from PIL import Image
from stages.conftest import ALONE, Images, PlainEngine

import taming_dist.stages.context
from taming_dist import cli
from taming_dist.config import hydra_entry
from taming_dist.data.codes import CodeBatch
from taming_dist.engine.settings import EngineConfig
from taming_dist.formats.manifest import Manifest
from taming_dist.models.prior.orders import arrange, restore
from taming_dist.stages import schemas
from taming_dist.stages.context import Context
from taming_dist.stages.interface import Config
from taming_dist.stages.prior import TransformerRecipe
from taming_dist.stages.vqgan import VQGANRecipe
from taming_dist.training.clock import Clock
from taming_dist.training.optimization import OptimConfig

SIZES = [  # of the paper's networks
    "model.channels=32",
    "model.multipliers=[1,1,1]",
    "model.blocks=1",
    "model.attention_resolutions=[]",
    "model.latent_channels=16",
]
IMAGES = [
    "model.resolution=32",
    "data.size=32",
    "loss.discriminator=null",
    "loss.terms.perceptual.weight=0",
    "data.train=x",
    "data.val=x",
]
CODES = [
    "model.vocabulary=24",
    "model.grid=[3,4]",
    "model.layers=2",
    "model.heads=2",
    "model.width=16",
    "data.train=x",
    "data.val=x",
]
HYDRAS_OWN = ("hydra", "_dummy_empty_config_.yaml")


def composed(overrides: list[str]) -> Config:
    """The configuration of a command line."""
    store, found = ConfigStore.instance(), []
    store.repo = {name: store.repo[name] for name in HYDRAS_OWN}
    sys.argv = ["train", *overrides]
    hydra_entry("train", Config, found.append, schemas())
    return found[0]


def context() -> Context:
    return Context(OptimConfig(lr=1e-3), EngineConfig(), ALONE, 2)


def first_stage(words: list[str]) -> None:
    others = any(word.startswith("model=") for word in words)
    config = composed([*words, *IMAGES, *([] if others else SIZES)])
    recipe = VQGANRecipe(config.model, config.loss, context())
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    (scalars,) = recipe.train_step([Images(images)], Clock(2, 4))
    assert torch.isfinite(scalars["loss"])
    for name, term in config.loss.terms.items():
        assert (name in scalars) == (term.weight > 0)
    assert all(gradient.isfinite().all() for gradient in recipe.generator.gradients.values())
    assert any(name.startswith("encoder") for name in recipe.generator.gradients)
    quantizer = recipe.generator.module.eval().quantize
    z = torch.randn(2, quantizer.dim, 3, 4)
    found, codes = quantizer(z), quantizer.encode(z)
    assert torch.equal(found.codes, codes)
    assert 0 <= codes.min() <= codes.max() < quantizer.vocabulary
    torch.testing.assert_close(found.z_q, quantizer.lookup(codes))


def prior(words: list[str]) -> None:
    config = composed([*words, *CODES])
    recipe = TransformerRecipe(config.model, config.loss, context())
    network = recipe.network
    before = {name: value.clone() for name, value in network.named_parameters()}
    columns = {"codes": torch.randint(24, (2, 3, 4)), "crop": torch.rand(2, 5) / 2}
    batch = CodeBatch(columns, torch.arange(2))
    (scalars,) = recipe.train_step([batch], Clock(2, 4))
    assert torch.isfinite(scalars["loss"])
    blocks = {name for name in before if name.startswith("blocks.")}
    assert blocks
    assert all(not torch.equal(before[name], network.get_parameter(name)) for name in blocks)
    network.eval()
    tokens = arrange(batch.codes, network.places)
    assert torch.equal(restore(tokens, (3, 4), network.places), batch.codes)
    prefix = network.condition.prefix(2, columns)
    (ids,) = prefix.parts
    assert ids.shape == (2, network.condition.length)
    assert 0 <= ids.min() <= ids.max() < network.condition.vocabulary
    logits, (first, cache) = network(tokens, prefix), network.begin(prefix)
    torch.testing.assert_close(first, logits[:, 0])
    torch.testing.assert_close(network.step(tokens[:, :1], cache), logits[:, 1])
    uniforms = torch.zeros(2, network.scheme.uniforms(12))
    greedy = network.scheme.generate(
        network, prefix, 12, 24, lambda logits, _: logits.argmax(1), uniforms
    )
    assert torch.equal(greedy, network(greedy, prefix).argmax(2))


def layout(words: list[str]) -> None:
    root = Path("pets")
    (root / "annotations/trimaps").mkdir(parents=True)
    (root / "images").mkdir()
    names = ["Bengal_1", "Bengal_2", "Birman_7"]
    for number, name in enumerate(names):
        Image.new("RGB", (24, 16), (80 * number, 0, 0)).save(root / f"images/{name}.jpg")
        Image.new("L", (24, 16), 1 + number).save(root / f"annotations/trimaps/{name}.png")
    lines = [
        "#Image CLASS-ID SPECIES BREED ID",
        "Bengal_1 1 1 1",
        "Bengal_2 1 1 1",
        "Birman_7 2 1 2",
    ]
    (root / "annotations/trainval.txt").write_text("\n".join(lines) + "\n")
    program, *arguments = words
    sys.argv = [program, *({"DIR": "pets", "OUT": "out"}.get(word, word) for word in arguments)]
    make_shards = runpy.run_path(str(Path(cli.__file__).parents[1] / program))
    make_shards["main"]()
    manifest = Manifest.load(Path("out"))
    (shard,) = manifest.shards
    assert shard.columns == {"cls": 3, "jpg": 3, "seg.png": 3}
    assert manifest.classes == ("Bengal", "Birman")


def run(command: str) -> None:
    """Run a command of the page."""
    _, *words = shlex.split(command)
    if words[0] == "tools/make_shards.py":
        layout(words)
    elif "flickr_transformer" in command:
        prior(words[2:])
    else:
        first_stage(words[2:])


if __name__ == "__main__":
    torch.manual_seed(0)
    taming_dist.stages.context.Engine = PlainEngine  # type: ignore[misc, assignment]
    for command in sys.stdin.read().splitlines():
        run(command)
        print(f"done: {command}", flush=True)
