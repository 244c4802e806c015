"""The two stages as the entry point sees them: what data they open and which recipe they train."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from taming_dist.config import Config, to_yaml
from taming_dist.data.batching import BatchSizes
from taming_dist.data.codes import CodeDataset, CodeReader, CodesConfig
from taming_dist.data.images import Preprocess
from taming_dist.data.mixture import resolve_training
from taming_dist.data.reader import ImagesConfig, Reader
from taming_dist.data.streaming import StreamingReader, stream_locations
from taming_dist.engine.checkpoint import newest_valid
from taming_dist.engine.world import World
from taming_dist.errors import UserError
from taming_dist.formats.files import write_bytes, writing
from taming_dist.formats.manifest import resolve
from taming_dist.launch import Place
from taming_dist.models.discriminators import build_discriminator
from taming_dist.models.prior.transformer import Transformer, TransformerConfig
from taming_dist.models.vqgan import VQGAN
from taming_dist.placeholders import refuse_placeholder
from taming_dist.stages.label_maps import LabelMapLossConfig, LabelMapRecipe
from taming_dist.stages.prior import TransformerRecipe
from taming_dist.stages.setup import Setup
from taming_dist.stages.vqgan import VQGANRecipe
from taming_dist.training.clock import Clock
from taming_dist.training.export import DISCRIMINATOR_FILE, check_tensors
from taming_dist.training.loop import Data
from taming_dist.training.recipe import Recipe
from taming_dist.training.sinks import Sinks, append_line, open_sinks


class Stage(Protocol):
    """One stage: opens its data before the process group starts, builds its recipe after."""

    def open_data(self, here: Place, batch: BatchSizes, run_dir: Path) -> Data: ...
    def build_recipe(self, world: World, batch: BatchSizes) -> Recipe: ...


def choose_stage(config: Config) -> Stage:
    """The stage that the configuration is of."""
    if isinstance(config.model, TransformerConfig):
        return TransformerStage(config)
    labels = isinstance(config.loss, LabelMapLossConfig)
    return LabelMapStage(config) if labels else VQGANStage(config)


class FirstStage:
    """Stage 1: images, or the maps beside them."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.initial: dict[str, Tensor] | None = None

    def open_data(self, here: Place, batch: BatchSizes, run_dir: Path) -> Data:
        data: ImagesConfig = self.config.data
        settings: dict[str, Any] = {
            "seed": self.config.run.seed,
            "columns": [self.config.model.modality.column],
            "with_classes": False,
            "threads": data.threads,
            "max_bad_fraction": data.max_bad_fraction,
            "damaged": data.damaged,
            "on_bad": lambda record: append_line(run_dir / "bad_samples.jsonl", record),
        }
        place: dict[str, Any] = {"rank": here.rank, "world_size": here.world_size}
        self.initial = initial_weights(self.config, run_dir, VQGAN, self.config.model)
        train = open_training(data, micro_batch=batch.micro_batch, **place, **settings)
        val_set, centred = resolve_images(data, "val"), Preprocess(data.size)
        most = self.config.train.validate_images
        val = Reader(
            val_set,
            centred,
            micro_batch=batch.micro_batch,
            most_evaluated=most,
            **place,
            **settings,
        )
        # nothing is written before the start: validation reports what it cannot read
        unread: list[dict[str, Any]] = []
        settings |= {"on_bad": unread.append, "micro_batch": self.config.train.preview_images}
        shown = Reader(val_set, centred, **settings)
        return join(train, val, shown, batch, unread)

    def build_recipe(self, world: World, batch: BatchSizes) -> Recipe:
        raise NotImplementedError


class VQGANStage(FirstStage):
    """With the losses of the paper: photographs, depth maps."""

    def open_data(self, here: Place, batch: BatchSizes, run_dir: Path) -> Data:
        data = super().open_data(here, batch, run_dir)
        self.initial_discriminator = discriminator_weights(self.config, run_dir)
        return data

    def build_recipe(self, world: World, batch: BatchSizes) -> VQGANRecipe:
        config = self.config
        setup = recipe_setup(config, world, batch)
        initial = (self.initial, self.initial_discriminator)
        return VQGANRecipe(config.model, config.loss, setup, *initial)


class LabelMapStage(FirstStage):
    """One channel per class, cross-entropy, no discriminator."""

    def build_recipe(self, world: World, batch: BatchSizes) -> LabelMapRecipe:
        setup = recipe_setup(self.config, world, batch)
        return LabelMapRecipe(self.config.model, self.config.loss, setup, self.initial)


class TransformerStage:
    """Stage 2: codes. Vocabulary, grid and tokenizer of the model are those of the code shards, and
    have to agree where the configuration names them."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.codes = open_codes(config.data, "train")
        self.model = fitted(config.model, self.codes, config.data.train)

    def open_data(self, here: Place, batch: BatchSizes, run_dir: Path) -> Data:
        data: CodesConfig = self.config.data
        self.initial = initial_weights(self.config, run_dir, Transformer, self.model)
        val_set = open_codes(data, "val")
        fitted(self.model, val_set, data.val)
        if val_set.class_names != self.codes.class_names:
            raise UserError(
                f"data.train and data.val name other classes, {self.codes.class_names} and "
                f"{val_set.class_names}: make both sets of shards from the same class folders"
            )
        seed = self.config.run.seed
        place: dict[str, Any] = {"rank": here.rank, "world_size": here.world_size, "seed": seed}
        train = CodeReader(
            self.codes, lanes=data.lanes, block=data.block, micro_batch=batch.micro_batch, **place
        )
        most = self.config.train.validate_images
        val = CodeReader(val_set, micro_batch=batch.micro_batch, most_evaluated=most, **place)
        shown = CodeReader(val_set, micro_batch=self.config.train.preview_images, seed=seed)
        self.decoder = self._load_decoder()
        return join(train, val, shown, batch)

    def build_recipe(self, world: World, batch: BatchSizes) -> TransformerRecipe:
        setup = recipe_setup(self.config, world, batch)
        return TransformerRecipe(self.model, self.config.loss, setup, self.decoder, self.initial)

    def _load_decoder(self) -> VQGAN | None:
        """The VQGAN that wrote the codes, without its encoder."""
        if not self.config.data.vqgan:
            return None
        vqgan = VQGAN.from_pretrained(self.config.data.vqgan)
        if vqgan.fingerprint != self.codes.tokenizer_fingerprint:
            raise UserError(
                f"data.vqgan={self.config.data.vqgan} has the fingerprint {vqgan.fingerprint}, but "
                f"the codes of {self.config.data.train} were written by "
                f"{self.codes.tokenizer_fingerprint}: tokenize again, or name that VQGAN"
            )
        del vqgan.encoder
        return vqgan


def recipe_setup(config: Config, world: World, batch: BatchSizes) -> Setup:
    """What the recipes of both stages are given beside model and loss."""
    cut = (batch.micro_batch, batch.accumulation)
    return Setup(config.optim, config.engine, world, *cut, config.run.seed)


def open_training(data: ImagesConfig, **settings: Any) -> Reader | StreamingReader:
    """The reader of data.train: by its index, or with data.streaming=true in sequence."""
    if not data.streaming:
        dataset, preprocess = resolve_images(data, "train"), data.preprocess()
        return Reader(dataset, preprocess, lanes=data.lanes, block=data.block, **settings)
    try:
        locations = stream_locations(data.train, data.allow_pipe)
    except UserError as error:
        raise UserError(f"data.train: {error}") from error
    return StreamingReader(locations, data.preprocess(), **settings)


def resolve_images(data: ImagesConfig, name: str) -> Any:
    """The shards of data.train or data.val; where they are missing, one line says what to run."""
    spec = getattr(data, name)
    try:
        if name == "train":
            return resolve_training(spec)
        if isinstance(spec, Mapping):
            raise UserError("it is read whole, once: give a list of specs, not a mixture")
        return resolve(spec)
    except UserError as error:
        raise UserError(f"data.{name}: {error}") from error


def open_codes(data: CodesConfig, name: str) -> CodeDataset:
    """The code shards of data.train or data.val."""
    try:
        return CodeDataset.open(getattr(data, name), data.in_memory)
    except UserError as error:
        raise UserError(
            f"data.{name}: {error} (code shards come from: python tools/tokenize_dataset.py)"
        ) from error


def fitted(model: TransformerConfig, codes: CodeDataset, spec: str) -> TransformerConfig:
    """The model's configuration with what the codes say; UserError where the two differ."""
    found: dict[str, Any] = {
        "vocabulary": codes.vocabulary,
        "grid": list(codes.grid),
        "vqgan_fingerprint": codes.tokenizer_fingerprint,
    }
    if model.condition == "codes":
        if codes.condition is None:
            raise UserError(
                f"model.condition=codes, but {spec} has codes of images only: make "
                f"them with tools/tokenize_dataset.py --condition-model EXPORT"
            )
        found["condition_vocabulary"] = codes.condition["vocab"]
        found["condition_grid"] = list(codes.condition["grid"])
        found["condition_fingerprint"] = codes.condition["fingerprint"]
    for name, value in found.items():
        asked = getattr(model, name)
        if asked and asked != value:
            raise UserError(
                f"model.{name} is {asked}, but the codes of {spec} have {value}: use the codes of "
                f"that tokenizer, or another run"
            )
    if model.condition == "class":
        if not codes.classes_present:
            raise UserError(
                f"model.condition=class, but the codes of {spec} have no classes: make image "
                f"shards with labels (tools/make_shards.py --labels folders) and tokenize them"
            )
        codes.check_classes()
        found["classes"] = model.classes or max(codes.num_classes, len(codes.class_names or ()))
        if codes.num_classes > found["classes"]:
            raise UserError(
                f"model.classes={model.classes}, but {spec} has classes up to "
                f"{codes.num_classes - 1}"
            )
    complete = dataclasses.replace(model, **found)
    complete.check()
    return complete


# What changes a model's answers without changing its tensors.
UNSEEN = (
    "vocabulary",
    "modality.name",
    "quantizer.name",
    "quantizer.normalized",
    "heads",
    "grid",
    "condition",
    "condition_table",
    "condition_grid",
    "classes",
)


def starts_from_export(config: Config, run_dir: Path) -> bool:
    """Whether run.init is given and the run has no checkpoint of its own to go on from."""
    return bool(config.run.init) and not newest_valid(run_dir / "checkpoints", lambda _: None)


def initial_weights(
    config: Config, run_dir: Path, kind: Any, model: Any
) -> dict[str, Tensor] | None:
    """The tensors of run.init, checked against the model that is to start from them.

    None without run.init, and for a run that has a checkpoint of its own to go on from.
    """
    folder = config.run.init
    if not starts_from_export(config, run_dir):
        return None
    try:
        found = kind.from_pretrained(folder)
    except UserError as error:
        raise UserError(f"run.init: {error}") from error
    for key in UNSEEN:
        theirs, ours = (
            functools.reduce(lambda part, name: getattr(part, name, None), key.split("."), whole)
            for whole in (found.config, model)
        )
        if theirs != ours:
            raise UserError(
                f"run.init={folder} has model.{key}={theirs} and this run {ours}: set it so, or "
                f"start from another export"
            )
    state = found.state_dict()
    with torch.device("meta"):
        check_tensors(kind(model).state_dict(), state, f"run.init={folder}")
    return state


def discriminator_weights(config: Config, run_dir: Path) -> dict[str, Tensor] | None:
    """The tensors of a discriminator that was kept beside the VQGAN of run.init, if there is one
    and the run trains one; checked against loss.discriminator."""
    path = Path(config.run.init) / DISCRIMINATOR_FILE
    wanted = config.loss.discriminator is not None and starts_from_export(config, run_dir)
    if not wanted or not path.is_file():
        return None
    refuse_placeholder(path, "the weights of a discriminator")
    try:
        state = load_file(path)
    except SafetensorError as error:
        raise UserError(f"{path} is damaged ({error}): import the checkpoint again") from error
    with torch.device("meta"):
        network = build_discriminator(config.loss.discriminator, config.model.modality.channels)
    source = f"loss.discriminator is not of the kind of {path} (remove it to start anew), which"
    check_tensors(network.state_dict(), state, source)
    return state


def join(
    train: Any, val: Any, shown: Any, batch: BatchSizes, unread: Sequence[dict[str, Any]] = ()
) -> Data:
    """The readers as the loop takes them, with as many validation batches on every rank; `unread`
    are the samples that `shown` cannot read."""
    samples = val.plan.num_evaluated
    if samples < batch.world_size:
        key = "data.val" if samples == val.plan.num_samples else "train.validate_images"
        raise UserError(
            f"{key} gives {samples} samples for {batch.world_size} ranks: give each rank at least "
            f"one"
        )
    train.plan.check_start(0)  # refuses lanes that do not fit, before any process group starts
    val_batches = math.ceil(math.ceil(samples / batch.world_size) / batch.micro_batch)
    preview = next(shown.epoch_batches(), None)
    if preview is None:
        raise UserError(
            f"data.val: none of its {val.plan.num_samples} samples can be read; the first, "
            f"{unread[0]['key']} in {unread[0]['shard']}: {unread[0]['error']}"
        )
    return Data(train, val, val_batches, preview, batch.accumulation)


def first_rank_sinks(config: Config, clock: Clock, run_dir: Path) -> Sinks:
    """The sinks of rank 0, and config.yaml written."""
    with writing(run_dir):
        write_bytes(run_dir / "config.yaml", to_yaml(config).encode())
    return open_sinks(config.log, run_dir, config.run.name, clock, yaml.safe_load(to_yaml(config)))
