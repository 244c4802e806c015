"""The configuration as its users meet it: experiments compose, mistakes end in one line, exit 2."""

import io
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hydra.core.config_store import ConfigStore
from PIL import Image

import taming_dist.train as entry
from taming_dist.config import check, hydra_entry, to_yaml
from taming_dist.data.batching import batch_sizes
from taming_dist.description import describe
from taming_dist.engine.world import World
from taming_dist.errors import UserError
from taming_dist.evaluate import EvaluateConfig
from taming_dist.formats.code_shards import CodeShard, write_codes_manifest
from taming_dist.launch import ALONE
from taming_dist.losses.terms import L1Config, L2Config, PerceptualConfig
from taming_dist.models.discriminators import DinoConfig, StyleGANConfig
from taming_dist.models.networks import MaskGITConfig, ViTConfig
from taming_dist.models.prior.transformer import TransformerConfig
from taming_dist.models.quantizers import VectorQuantizerConfig
from taming_dist.models.vqgan import VQGAN, FirstStageConfig, VQGANConfig
from taming_dist.sample import SampleConfig
from taming_dist.stages import schemas, stage_of
from taming_dist.stages.interface import Config, Start
from taming_dist.usage import conf_dir
from tests.data.shard_files import writing_shards
from tests.tiny_models import tiny_config

EXPERIMENTS = sorted(path.stem for path in (conf_dir() / "experiment").glob("*.yaml"))
Compose = Callable[..., Config]
Refuse = Callable[..., str]


@pytest.fixture
def refused(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> Refuse:
    """The line that a command line is refused with, by the real entry point; nothing is written."""

    def call(*overrides: str) -> str:
        before = sorted(elsewhere.rglob("*"))
        with monkeypatch.context() as patched:
            patched.setattr(sys, "argv", ["train.py", *overrides])
            patched.setattr("taming_dist.engine.start.init_world", not_reached)
            with pytest.raises(SystemExit) as ending:
                entry.main()
        out, err = capsys.readouterr()
        assert ending.value.code == 2
        assert out == ""
        assert err.startswith("error: ")
        assert err.count("\n") == 1, err
        assert sorted(elsewhere.rglob("*")) == before, "something was written"
        return err

    return call


def not_reached(*_: Any) -> None:
    raise AssertionError("the mistake was not found before the process group starts")


def make_images(folder: Path, count: int = 12) -> None:
    with writing_shards(folder, "images", 8) as write:
        for number in range(count):
            pixels = np.random.default_rng(number).integers(0, 256, (40, 40, 3), dtype=np.uint8)
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "PNG")
            write(f"{number:04d}", {"png": file.getvalue()})


def make_codes(folder: Path, fingerprint: str = "a" * 64, classes: int = 3) -> None:
    folder.mkdir()
    shard = CodeShard(
        {
            "vocab": 16,
            "tokenizer": {"fingerprint": fingerprint},
            "source": {"fingerprint": "e" * 64, "range": [0, 12], "bad": []},
            "preprocessing": {"size": 32},
        },
        codes=np.random.default_rng(0).integers(0, 16, (12, 1, 2, 3), dtype=np.uint16),
        sources=np.arange(12),
        keys=[str(number) for number in range(12)],
        classes=np.arange(12, dtype=np.int32) % classes,
    )
    shard.save(folder / "codes-000000.tar")
    write_codes_manifest(folder, ["codes-000000.tar"], None)


IMAGES = ("+experiment=flickr", "+scale=laptop", "data.train=images", "data.val=images")
CODES = (
    "+experiment=flickr_transformer",
    "+scale=laptop",
    "data.train=codes",
    "data.val=codes",
    "data.vqgan=''",
)


# Composing


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_composes_and_passes_its_checks(compose: Compose, experiment: str) -> None:
    """At laptop size; tests/test_documents.py has them as they are."""
    config = compose(f"+experiment={experiment}", "+scale=laptop")
    assert check(config, world_size=1).micro_batch <= config.data.micro_batch
    assert config.run.dir == f"outputs/{config.run.name}"
    assert f"name: {config.run.name}" in to_yaml(config)


@pytest.mark.parametrize("zero", range(4))
def test_every_engine_composes(compose: Compose, zero: int) -> None:
    assert compose("+experiment=flickr", f"engine=zero{zero}").engine.zero == zero


def test_flickr_is_the_papers_model(compose: Compose) -> None:
    config = compose("+experiment=flickr")
    model: VQGANConfig = config.model
    assert (model.vocabulary, model.quantizer.dim, model.factor) == (1024, 256, 16)
    assert (model.resolution, model.channels, model.blocks) == (256, 128, 2)
    assert model.multipliers == [1, 1, 2, 2, 4]
    assert config.optim.peak(config.data.global_batch) == pytest.approx(4.5e-6 * 24)
    gpt: TransformerConfig = compose("+experiment=flickr_transformer").model
    assert (gpt.layers, gpt.heads, gpt.width) == (24, 16, 1024)


def test_what_is_typed_wins_over_the_scale_wherever_it_stands(compose: Compose) -> None:
    laptop = compose("+experiment=flickr", "+scale=laptop")
    assert (laptop.data.size, laptop.model.channels, laptop.train.steps) == (64, 32, 200)
    typed = ("data.size=128", "train.steps=7", "train.validate_every=3")
    after = compose("+experiment=flickr", "+scale=laptop", *typed)
    before = compose(*typed, "+experiment=flickr", "+scale=laptop")
    assert before == after
    assert (after.data.size, after.model.channels, after.train.steps) == (128, 32, 7)
    assert (after.train.validate_every, after.train.checkpoint_every) == (3, 100)
    mapping = compose("loss.discriminator={channels: 24}", "+experiment=flickr", "+scale=laptop")
    assert (mapping.loss.discriminator.channels, mapping.loss.discriminator.layers) == (24, 3)
    choices = ("model=f16", "loss=vqgan", "data=images", "optim=vqgan")  # give no values
    assert compose("+experiment=flickr", *choices, "+scale=laptop") == laptop


def test_a_run_says_what_was_scaled(compose: Compose) -> None:
    config = compose("+experiment=flickr", "+scale=laptop", "data.lanes=16", "data.block=64")
    assert "train.steps: 200000 -> 200" in config.scaled
    assert "model.attention_resolutions: [16] -> []" in config.scaled
    assert "optim.base_lr: 4.5e-06 -> null" in config.scaled
    assert not any("data.lanes" in line or "data.block" in line for line in config.scaled)
    world = World(0, 1, 0, torch.device("cpu"))
    said = describe(config, world, check(config, 1), SimpleNamespace(engines={}))
    assert said.splitlines()[1] == f"scaled    {', '.join(config.scaled)}"
    assert "batch     8 images = 1 rank x 8 x 1 micro-batches" in said
    assert compose("+experiment=flickr").scaled == []


def test_the_printed_configuration_is_the_scaled_one(
    elsewhere: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    line = ["+experiment=flickr", "+scale=laptop", "run.name=1e3", "--cfg", "job"]
    monkeypatch.setattr(sys, "argv", ["train.py", *line])
    entry.main()
    printed = yaml.safe_load(capsys.readouterr().out)
    assert (printed["train"]["steps"], printed["data"]["size"]) == (200, 64)
    assert printed["run"]["name"] == "1e3"
    assert sys.argv[1:] == line


@pytest.mark.parametrize("name", ["mine", "my conf, n\u00fcrnberg=1"])
def test_experiments_of_ones_own_are_found_in_the_folder_that_is_named(
    compose: Compose, elsewhere: Path, name: str
) -> None:
    (elsewhere / name / "experiment").mkdir(parents=True)
    text = "# @package _global_\ndefaults: [flickr, _self_]\nrun: {name: own}\n"
    (elsewhere / name / "experiment/own.yaml").write_text(text)
    assert compose("--config-dir", name, "+experiment=own").run.name == "own"


# Text on the command line


@pytest.mark.parametrize(
    "name",
    [
        "20240101_120000",
        "1e3",
        "true",
        "0x10",
        "two words",
        "n\u00fcrnberg \u00e9",
        "a{b[c(d=e~f#g'h\"i,j:k",
        "back\\slash\\",
        "$HOME",
    ],
)
def test_names_and_paths_are_kept_as_typed(compose: Compose, name: str) -> None:
    config = compose(
        "+experiment=flickr", f"run.name={name}", f"run.init={name}", f"data.val=runs/{name}"
    )
    assert (config.run.name, config.run.dir) == (name, f"outputs/{name}")
    assert (config.run.init, config.data.val) == (name, f"runs/{name}")
    codes = compose("+experiment=flickr_transformer", f"data.vqgan={name}", f"data.train={name}")
    assert (codes.data.vqgan, codes.data.train) == (name, name)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("https://host/set/{000..099}.tar", "https://host/set/{000..099}.tar"),
        ("{a,b}", "{a,b}"),
        ("2024", "2024"),
        ("~/images", "HOME/images"),
        ('"quoted, as Hydra has it"', "quoted, as Hydra has it"),
        ("[a,2024, b=c]", ["a", "2024", "b=c"]),
        ("[~/a,https://host/{0,1}.tar]", ["HOME/a", "https://host/{0,1}.tar"]),
        (
            "{photos:{shards:~/photos,weight:2},art: {shards:[https://host/{0..9}.tar,b]}}",
            {
                "photos": {"shards": "HOME/photos", "weight": 2},
                "art": {"shards": ["https://host/{0..9}.tar", "b"]},
            },
        ),
    ],
)
def test_shard_specs_are_texts_lists_and_mixtures_as_typed(
    compose: Compose, monkeypatch: pytest.MonkeyPatch, value: str, expected: Any
) -> None:
    monkeypatch.setenv("HOME", "HOME")
    assert compose("+experiment=flickr", f"data.train={value}").data.train == expected


@pytest.mark.parametrize(
    ("override", "group", "fix"),
    [
        (
            "loss/terms@loss.terms.perceptual=null",
            "loss/terms",
            "~loss/terms@loss.terms.perceptual",
        ),
        ("model=null", "model", "~model"),
        ("engine=3", "engine", "~engine"),
        ("engine={zero:1}", "engine", "engine.KEY=VALUE"),
    ],
)
def test_a_group_for_which_no_name_is_chosen_is_refused(
    refused: Refuse, override: str, group: str, fix: str
) -> None:
    error = refused("+experiment=flickr", override)
    assert error.startswith(f"error: {override!r}: {group}= chooses a name, as in conf/{group}; ")
    assert error.endswith(f"{fix}\n")


def test_references_to_other_keys_still_work_and_home_is_expanded(compose: Compose) -> None:
    config = compose("+experiment=flickr", "run.dir=~/runs/${run.name}-a", "run.name=1e3")
    assert config.run.dir == str(Path.home() / "runs/1e3-a")


@pytest.mark.parametrize(
    ("module", "overrides", "expected"),
    [
        (
            "sample",
            ["transformer=a{b", "vqgan=1e3", "out=~/o=ut", "condition=[a,b]", "n=3"],
            {"transformer": "a{b", "vqgan": "1e3", "condition": ["a", "b"], "n": 3},
        ),
        (
            "evaluate",
            ["model=true", "data=[a,{0..9}.tar]", "out=~/o=ut", "batch=3"],
            {"model": "true", "data": ["a", "{0..9}.tar"], "batch": 3},
        ),
    ],
)
def test_sampling_and_evaluation_keep_text_in_the_same_way(
    elsewhere: Path,
    monkeypatch: pytest.MonkeyPatch,
    module: str,
    overrides: list[str],
    expected: dict[str, Any],
) -> None:
    schema = {"sample": SampleConfig, "evaluate": EvaluateConfig}[module]
    folder = conf_dir() / "evaluate" if module == "evaluate" else None
    monkeypatch.setattr(sys, "argv", [module, *overrides])
    store = ConfigStore.instance()  # as in a process of its own
    groups = set(schemas()) | {"train_schema.yaml"}
    left = {name: node for name, node in store.repo.items() if name not in groups}
    monkeypatch.setattr(store, "repo", left)
    found: list[Any] = []
    hydra_entry(module, schema, found.append, folder=folder)
    for key, value in ({"out": str(Path.home() / "o=ut")} | expected).items():
        assert getattr(found[0], key) == value


def test_the_scale_knows_both_stages_and_the_optimizer_has_one_rate(compose: Compose) -> None:
    config = compose("+experiment=flickr_transformer", "+scale=laptop")
    assert (config.model.layers, config.model.width) == (4, 128)
    assert (config.optim.lr, config.optim.base_lr) == (1e-3, None)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("loss/discriminator=stylegan", StyleGANConfig(size=64, channels=16)),
        ("loss/discriminator=dino", DinoConfig()),
        ("loss.discriminator=null", None),
    ],
)
def test_the_scale_leaves_out_what_another_discriminator_does_not_have(
    compose: Compose, override: str, expected: Any
) -> None:
    config = compose("+experiment=flickr", "+scale=laptop", "data.size=64", override)
    assert config.loss.discriminator == expected


def test_a_quantizer_is_chosen_by_its_group(compose: Compose) -> None:
    config = compose("+experiment=flickr", "model/quantizer=ema", "model.quantizer.decay=0.5")
    assert (config.model.quantizer.name, config.model.quantizer.decay) == ("ema", 0.5)


@pytest.mark.parametrize(
    ("name", "variant", "codes", "dim"),
    [
        ("vector", "vector", 1024, 256),
        ("llamagen", "vector", 16_384, 8),
        ("ema", "ema", 1024, 256),
        ("gumbel", "gumbel", 8192, 256),
        ("fsq", "fsq", 15_360, 5),
        ("lfq", "lfq", 16_384, 14),
        ("bsq", "bsq", 16_384, 14),
        ("ibq", "ibq", 16_384, 256),
        ("simvq", "simvq", 16_384, 64),
        ("multiscale", "multiscale", 4_096, 32),
        ("product", "product", 32_768, 64),
        ("residual", "residual", 16_384, 256),
    ],
)
def test_every_quantizer_is_reached_by_its_name(
    compose: Compose, name: str, variant: str, codes: int, dim: int
) -> None:
    quantizer = compose("+experiment=flickr", f"model/quantizer={name}").model.quantizer
    assert (quantizer.name, quantizer.codes, quantizer.dim) == (variant, codes, dim)


@pytest.mark.parametrize(("name", "kind"), [("maskgit", MaskGITConfig), ("vit", ViTConfig)])
def test_networks_are_chosen_by_the_model_group(
    compose: Compose, name: str, kind: type[FirstStageConfig]
) -> None:
    config = compose("+experiment=custom", f"model={name}", "model/quantizer=fsq")
    assert type(config.model) is kind
    assert config.model.factor == 16
    assert check(config, world_size=1)
    small = compose("+experiment=custom", f"model={name}", "+scale=laptop", "data.size=64")
    sizes = {"maskgit": ("channels", 32), "vit": ("width", 128)}
    assert getattr(small.model, sizes[name][0]) == sizes[name][1]
    assert not any("latent_channels" in change for change in small.scaled)


def test_a_discriminator_is_chosen_by_its_group_and_null_is_none(compose: Compose) -> None:
    flickr = ("+experiment=flickr", "data.size=128")
    stylegan = compose(*flickr, "loss/discriminator=stylegan", "loss.discriminator.channels=8")
    assert stylegan.loss.discriminator == StyleGANConfig(size=128, channels=8)
    assert check(stylegan, world_size=1)
    actnorm = compose(*flickr, "loss.discriminator.norm=actnorm")
    assert check(actnorm, world_size=1)
    none = compose(*flickr, "loss.discriminator=null")
    assert none.loss.discriminator is None
    assert check(none, world_size=1)


def test_the_written_configuration_says_everything(compose: Compose) -> None:
    text = to_yaml(compose(*IMAGES))
    for line in ("size: 64", "disc_start: 100", "seed: 23", "zero: 0", "beta: 0.25"):
        assert line in text


def test_terms_of_the_loss_are_added_weighed_and_dropped(compose: Compose) -> None:
    added = ["+loss/terms@loss.terms.l2=l2", "loss.terms.l2.weight=0.5", "loss.terms.l1.weight=0"]
    assert compose(*IMAGES, *added).loss.terms == {
        "l1": L1Config(0.0),
        "perceptual": PerceptualConfig(),
        "l2": L2Config(0.5),
    }
    llamagen = compose("+experiment=llamagen_vq8").loss.terms
    assert llamagen == {"perceptual": PerceptualConfig(), "l2": L2Config()}


# Mistakes of the command line


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["+experiment=flickr", "model.chanels=64"], ["chanels", "did you mean 'channels'?"]),
        (["+experiment=flickr", "trian.steps=5"], ["trian", "did you mean 'train'?"]),
        (["+experiment=flickr", "+data.sise=64"], ["sise", "did you mean 'size'?"]),
        (["+experiment=flickr", "model.quantizer.bta=1"], ["bta", "did you mean 'beta'?"]),
        (["+experiment=flickr", "loss.l1_weight=1"], ["did you mean 'terms.l1.weight'?"]),
        (["+experiment=flickr", "loss.terms.l1=null"], ["loss/terms@loss.terms.l1=NAME"]),
        (["+experiment=flickr", "loss.terms.perceptual.net=1e3"], ["net=1e3: use vgg or alex"]),
        (["+experiment=llamagen_vq8", "loss.terms.l1.weight=1"], ["no key loss.terms.l1"]),
        (
            ["+experiment=maskgit", "model/condition=codes"],
            ["experiment/maskgit sets model.condition.classes, which what you have chosen instead"],
        ),
        (
            ["+experiment=llamagen_vq16", "model=vit"],
            ["experiment/llamagen_vq16 sets model.multipliers, which what you have chosen instead"],
        ),
        (["+experiment=custom", "model=vit", "model.channels=64"], ["no key model.channels"]),
        (["+experiment=custom", "model=vit", "model.name=maskgit"], ["choose networks by model="]),
        (["+experiment=custom", "model=vit", "data.size=100"], ["16 x 16 pixels, so use a mult"]),
        (["+experiment=flikr"], ["experiment/flikr", *EXPERIMENTS]),
        (["+experiment=flickr", "engine=zero4"], ["engine/zero4", "zero0", "zero3"]),
        (["+experiment=flickr", "+scale=phone"], ["scale/phone", "laptop"]),
        (["+experiment=flickr", "scale=laptop"], ["+scale=laptop"]),
        (["experiment=flickr"], ["+experiment=flickr"]),
        (["+experiment=flickr", "train.steps=many"], ["train.steps=many: use a whole number from"]),
        (["+experiment=flickr", "train.steps=1e3"], ["train.steps=1e3: use a whole number from"]),
        (["+experiment=flickr", "run.seed=true"], ["run.seed=true: use a whole number from 0"]),
        (
            ["+experiment=flickr", "model.multipliers=3"],
            ["model.multipliers=3: use one or more whole numbers from 1, written [a,b]\n"],
        ),
        (["+experiment=flickr", "optim.betas=[a,0.9]"], ["[a,0.9]: use 2 numbers from 0 to below"]),
        (["+experiment=flickr", "data.flip=perhaps"], ["data.flip=perhaps: use true or false\n"]),
        (["+experiment=flickr", "data.workers=1"], ["error: there is no key data.workers\n"]),
        (["+experiment=flickr", "~train.steps"], ["~train.steps: keys cannot be removed"]),
        (["+experiment=flickr", "train=3"], ["train=3: train is a group of keys"]),
        (["+experiment=flickr", "train.steps="], ["train.steps"]),
        (["+experiment=flickr", "train.steps"], ["train.steps", "key=value"]),
        (["+experiment=flickr", "train.st\u00e9ps=3"], ["train.st\u00e9ps=3", "key=value"]),
        (["+experiment=flickr", "optim.betas=[0.5"], ["optim.betas", """'optim.betas="[0.5"'"""]),
        (["+experiment=flickr", "data.flip={"], ["data.flip", """'data.flip="{"'"""]),
        (["+experiment=flickr", "optim.lr=1,2"], ["'optim.lr=1,2'", "'optim.lr=[1,2]'"]),
        (["+experiment=flickr", "-m"], ["one command is one run", "-m"]),
        (["+experiment=flickr", "--multirun", "run.name=a,b"], ["one command is one run"]),
        (["+experiment=flickr", "--steps", "3"], ["--steps", "key=value"]),
        (["+experiment=flickr", "--cfg", "jobs"], ["--cfg", "jobs"]),
        (["--config-name", "mine", "+experiment=flickr"], ["--config-name", "--config-dir"]),
        (["--config-path=mine", "+experiment=flickr", "--cfg", "job"], ["--config-path"]),
        (["--config-dir", "mine", "+experiment=flickr"], ["--config-dir mine: there is no such"]),
        (["+experiment=flickr", "run.name="], ["run.name is empty"]),
        (["+experiment=flickr", "run.name= "], ["run.name is empty"]),
        (["+experiment=flickr", "run.name=null"], ["run.name=null: give a value\n"]),
        (
            ["+experiment=flickr", "run.name=."],
            ["run.name=. is not the name of a folder: give another"],
        ),
        (["+experiment=flickr", "run.name=//"], ["run.name=// is not the name of a folder"]),
        (["+experiment=flickr", "run.name=../x"], ["run.name=../x"]),
        (["+experiment=flickr", "run.name=a\nb"], ["run.dir="]),
        (["+experiment=flickr", "run.dir="], ["run.dir=''"]),
        (["+experiment=flickr", "data.train="], ["data.train is empty"]),
        (["+experiment=flickr", "run.dir=x/${oops"], ["run.dir", "oops"]),
        ([], ["run.name=...", "data.global_batch=...", "data.train=..."]),
        (["+experiment=flickr", "optim.lr=1e-4"], ["optim.lr", "optim.base_lr"]),
        (["+experiment=flickr", "log.wandb=yes"], ["log.wandb", "offline"]),
        (
            ["+experiment=flickr", "loss.discriminator.norm=layer"],
            ["loss.discriminator.norm=layer"],
        ),
        (["+experiment=flickr", "loss.adaptive=local"], ["loss.adaptive=local", "per_rank"]),
        (["+experiment=flickr", "loss.augment=[flip]"], ["loss.augment=flip", "cutout"]),
        (
            ["+experiment=flickr", "loss/discriminator=stylegan", "data.size=96"],
            ["loss.discriminator.size=96", "power of two"],
        ),
        (
            ["+experiment=flickr", "loss/discriminator=dino", "loss.discriminator.weights=no.pth"],
            ["loss.discriminator.weights=no.pth", "there is no such file"],
        ),
        (["+experiment=flickr", "model=gpt"], ["model=TransformerConfig", "VQGANLossConfig"]),
        (["+experiment=flickr", "model.channels=100"], ["model.channels=100", "multiple of 32"]),
        (["+experiment=flickr", "train.steps=0"], ["train.steps=0"]),
    ],
)
def test_a_mistyped_command_line_is_refused_in_one_line(
    refused: Refuse, overrides: list[str], expected: list[str]
) -> None:
    said = refused(*overrides)
    for part in expected:
        assert part in said


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "data.size=100",
            "data.size=100: a code of this model stands for 16 x 16 pixels, so use a multiple of "
            "16",
        ),
        ("data.size=0", "data.size=0"),
        ("data.size=-64", "data.size=-64"),
        ("data.global_batch=0", "data.global_batch=0"),
        ("data.micro_batch=0", "data.micro_batch=0"),
        ("data.lanes=7000", "data.lanes is 7000 but the data set has 12 samples"),
        ("data.threads=0", "data.threads"),
        ("loss.discriminator.layers=6", "set loss.discriminator.layers lower"),
        ("train.preview_images=0", "train.preview_images=0"),
        ("run.seed=-1", "run.seed=-1: use a whole number from 0"),
        ("data.crop=middle", "data.crop"),
        ("data.train=nowhere", "data.train: "),
        ("data.val=nowhere/*.tar", "data.val: "),
        ("data.val=empty", "data.val: "),
        ("data.train='images/images-{000000..000009}.tar'", "images-000002.tar"),
        ("data.train=null", "data.train: null is not a shard spec: give a folder"),
        ("data.train=2024", "data.train: there is no shard 2024"),
        ("data.train=[null]", "data.train: [None] is not a shard spec"),
        ("data.train={a:{shards:null}}", "data.train: a.shards: null is not a shard spec"),
        ("data.val=null", "data.val: null is not a shard spec"),
        ("data.max_bad_fraction=2", "data.max_bad_fraction=2.0: use a number from 0 to 1"),
        ("optim.betas=[0.5]", "optim.betas=[0.5]: use 2 numbers from 0 to below 1"),
        ("optim.betas=[0.9,1.0]", "optim.betas=[0.9, 1.0]: use 2 numbers from 0 to below 1"),
        ("optim.weight_decay=-1", "optim.weight_decay=-1.0: use a number from 0"),
        ("optim.lr=-1e-3", "optim.lr=-0.001: use a number from 0"),
        ("optim.lr=nan", "optim.lr=nan: use a number from 0"),
        ("optim.clip=inf", "optim.clip=inf: use a number from 0"),
        ("model.multipliers=[]", "model.multipliers=[]: use one or more whole numbers from 1"),
        ("model.multipliers=[1,0]", "model.multipliers=[1, 0]: use one or more whole numbers"),
        ("model.channels=0", "model.channels=0: use a whole number from 1"),
        ("model.channels=30", "model.channels=30: use a multiple of 32"),
        ("model.quantizer.codes=0", "model.quantizer.codes=0: use a whole number from 1 to"),
        ("model.quantizer.dim=9223372036854775807", "use a whole number from 1 to 65536"),
        ("model.dropout=1", "model.dropout=1.0: use a number from 0 to below 1"),
        ("train.log_every=-1", "train.log_every=-1: use a whole number from 0"),
        ("engine.zero=4", "engine.zero=4: use a whole number from 0 to 3"),
        ("loss.discriminator.layers=0", "loss.discriminator.layers=0: use a whole number from 1"),
        ("train.freeze=[encoder,head]", "there is no head, use encoder, quantizer, decoder"),
        ("train.freeze=encoder", "train.freeze=encoder: use a list, written [a,b]"),
        ("train.freeze=[quantizer]", "a codebook stays only with its encoder, name both"),
        ("train.freeze=[encoder,quantizer,decoder]", "leaves nothing to train"),
        ("train.freeze=[encoder]", "would keep random weights: give run.init=EXPORT"),
    ],
)
def test_values_that_do_not_fit_are_refused_before_anything_is_written(
    refused: Refuse, elsewhere: Path, override: str, expected: str
) -> None:
    make_images(elsewhere / "images")
    (elsewhere / "empty").mkdir()
    assert expected in refused(*IMAGES, override)


def test_a_validation_set_without_a_sample_that_can_be_read_is_refused(
    refused: Refuse, elsewhere: Path
) -> None:
    make_images(elsewhere / "images")
    with writing_shards(elsewhere / "damaged", "images", 8) as write:
        write("0000", {"png": b"not a picture"})
    said = refused(*IMAGES, "data.val=damaged")
    assert "data.val: none of its 1 samples can be read" in said
    assert "0000" in said


def test_missing_shards_name_the_command_that_makes_them(refused: Refuse) -> None:
    said = refused("+experiment=flickr")
    assert "data/flickr/train" in said
    assert "python tools/make_shards.py" in said


def test_a_file_in_place_of_the_run_directory_is_refused(refused: Refuse, elsewhere: Path) -> None:
    make_images(elsewhere / "images")
    (elsewhere / "taken").write_text("a file")
    assert "run.dir=taken is not a folder" in refused(*IMAGES, "run.dir=taken")
    assert "run.dir=taken/run is not a folder" in refused(*IMAGES, "run.dir=taken/run")


def test_a_run_directory_of_another_model_is_refused(
    refused: Refuse, compose: Compose, elsewhere: Path
) -> None:
    make_images(elsewhere / "images")
    (elsewhere / "outputs" / "flickr").mkdir(parents=True)
    text = to_yaml(compose(*IMAGES))
    (elsewhere / "outputs" / "flickr" / "config.yaml").write_text(text)
    assert "model.blocks=1, and this one has 2" in refused(*IMAGES, "model.blocks=2")
    said = refused(*IMAGES, "loss.discriminator.channels=8")
    assert "loss.discriminator.channels=16, and this one has 8: set it back" in said
    make_codes(elsewhere / "codes")
    assert "outputs/flickr" in refused(*CODES, "run.name=flickr")


def test_a_global_batch_that_the_ranks_cannot_share_is_refused(
    refused: Refuse, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_images(elsewhere / "images")
    launcher = {
        "RANK": "0",
        "WORLD_SIZE": "3",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "x",
        "MASTER_PORT": "1",
    }
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    said = refused(*IMAGES)
    assert "data.global_batch=8 is not a multiple of the number of ranks, 3: use" in said
    assert "data.global_batch=6 or data.global_batch=9" in said
    said = refused(*IMAGES, "data.global_batch=9")
    assert "data.lanes=8 is not a multiple of the number of ranks, 3: use data.lanes=6" in said


# Stage 2


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([f"model.vqgan_fingerprint={'b' * 64}"], ["b" * 64, "a" * 64, "use the codes of that"]),
        (["model.vocabulary=32"], ["model.vocabulary is 32", "have 16"]),
        (["model.grid=[3,3]"], ["model.grid is [3, 3]", "[2, 3]"]),
        (["data.val=others"], ["model.vqgan_fingerprint", "others", "c" * 64]),
        (
            ["model/condition=class", "model.condition.classes=2"],
            ["model.condition.classes=2", "up to 2"],
        ),
        (["train.freeze=[decoder]"], ["train.freeze=[decoder]: a transformer is trained whole"]),
        (["model/condition=clas"], ["model/condition", "class"]),
        (["model/condition=codes"], ["codes of images only", "--condition-model EXPORT"]),
        (["model/condition=coordinates"], ["no column crop", "--coordinates"]),
        (
            ["model/condition=objects", "model.condition.categories=5"],
            ["no column boxes", "--boxes"],
        ),
        (["model/condition=several"], ["model.condition.of=[]: name the conditions"]),
        (
            ["model/condition=several", "model.condition.of=[class,clas]"],
            ["model.condition.of=clas: use one of class, codes"],
        ),
        (
            ["model/condition=several", "model.condition.of=[{name: class, clases: 3}]"],
            ["model.condition.of: class has no key clases"],
        ),
        (["model.block_size=5"], ["model.block_size: 5 is too short", "at least 6"]),
        (["model.width=130"], ["model.width", "heads"]),
        (["data.train=nowhere"], ["data.train: ", "nowhere", "tools/tokenize_dataset.py"]),
        (["data.val=nowhere"], ["data.val: ", "nowhere", "tools/tokenize_dataset.py"]),
        (["data.vqgan=nowhere"], ["nowhere: no such export folder"]),
        (["data.vqgan=vqgan"], ["data.vqgan=vqgan has the fingerprint", "a" * 64]),
        (["data.train=images", "data.val=images"], ["images", "format"]),
    ],
)
def test_codes_that_do_not_fit_are_refused(
    refused: Refuse, elsewhere: Path, overrides: list[str], expected: list[str]
) -> None:
    make_codes(elsewhere / "codes")
    make_codes(elsewhere / "others", fingerprint="c" * 64)
    make_images(elsewhere / "images")
    VQGAN(
        tiny_config(VectorQuantizerConfig(codes=16, dim=4), 16, latent_channels=8)
    ).save_pretrained(elsewhere / "vqgan")
    said = refused(*CODES, *overrides)
    for part in expected:
        assert part in said


def test_there_may_be_more_classes_than_codes_unless_they_share_a_table(
    compose: Compose, elsewhere: Path
) -> None:
    make_codes(elsewhere / "codes")
    imagenet = (*CODES, "model/condition=class", "model.condition.classes=1000")

    def opened(config: Config) -> Any:
        start = Start(ALONE, check(config, 1), elsewhere / "run")
        return stage_of(config).open_data(config, start)

    assert opened(compose(*imagenet)).model.condition.classes == 1000
    with pytest.raises(
        UserError,
        match=r"model/condition=class: its 1000 tokens .* vocabulary=16, whose table they",
    ):
        opened(compose(*imagenet, "model.condition_table=shared"))


# The arithmetic


@pytest.mark.parametrize(
    ("global_batch", "largest", "ranks", "expected"),
    [
        (12, 12, 1, (12, 1)),
        (24, 12, 1, (12, 2)),
        (24, 12, 8, (3, 1)),
        (384, 12, 32, (12, 1)),
        (96, 5, 8, (4, 3)),
        (13, 12, 1, (1, 13)),
        (8, 8, 2, (4, 1)),
    ],
)
def test_the_largest_micro_batch_that_fits_is_taken(
    global_batch: int, largest: int, ranks: int, expected: tuple[int, int]
) -> None:
    sizes = batch_sizes(global_batch, largest, ranks)
    assert (sizes.micro_batch, sizes.accumulation) == expected
    assert sizes.micro_batch * sizes.accumulation * ranks == global_batch


@pytest.mark.parametrize(
    ("global_batch", "ranks", "nearest"),
    [
        (12, 8, "use data.global_batch=8 or data.global_batch=16"),
        (5, 8, "use data.global_batch=8$"),
        (100, 32, "use data.global_batch=96 or data.global_batch=128"),
    ],
)
def test_a_global_batch_that_the_ranks_cannot_share_names_the_nearest_that_they_can(
    global_batch: int, ranks: int, nearest: str
) -> None:
    said = f"data.global_batch={global_batch} is not a multiple of the number of ranks, {ranks}: "
    with pytest.raises(UserError, match=said + nearest):
        batch_sizes(global_batch, 12, ranks)


def test_lanes_that_the_ranks_cannot_share_are_refused_unless_there_are_none(
    compose: Compose,
) -> None:
    with pytest.raises(
        UserError, match=r"data\.lanes=256 .*: use data\.lanes=255 or data\.lanes=258"
    ):
        check(compose("+experiment=flickr"), world_size=3)
    assert (
        check(compose("+experiment=flickr", "data.streaming=true"), world_size=3).micro_batch == 8
    )
