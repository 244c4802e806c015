"""Whether codes are good to be generated: how well a transformer of a fixed recipe learns them.

How well a tokenizer reconstructs does not tell that. The codes of each are given the same
transformer, trained by one recipe for one number of images. What is measured is the likelihood that
it then gives to the codes of other images, and how far its samples, decoded by the tokenizer, are
from real images. The idea is that of arXiv 2504.08736 (AR probing).
"""

import dataclasses
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from taming_dist.data.batching import batch_sizes
from taming_dist.data.codes import CodeDataset, CodesConfig
from taming_dist.engine.checkpoint import Checkpoints
from taming_dist.engine.outcome import forget_outcome
from taming_dist.engine.settings import EngineConfig
from taming_dist.engine.world import World
from taming_dist.errors import UserError
from taming_dist.evaluation.config import EvaluateConfig, given, refuse
from taming_dist.evaluation.distribution import LEAST
from taming_dist.evaluation.folder import prepare_folder
from taming_dist.evaluation.image_sets import add_distances
from taming_dist.evaluation.probe_recipe import Probed, ProbeRecipe, recipe_for
from taming_dist.evaluation.progress import with_progress
from taming_dist.evaluation.protocol import Measured, Protocol
from taming_dist.evaluation.reference import FEATURES, Reference, features_of, open_reference
from taming_dist.evaluation.second_stage import Sampling, predictions
from taming_dist.evaluation.sources import Intake, Source
from taming_dist.inception import Inception, inception
from taming_dist.launch import Place
from taming_dist.models.prior.transformer import Transformer, TransformerConfig
from taming_dist.models.vqgan import VQGAN
from taming_dist.stages import recipe_of, stage_of
from taming_dist.stages.interface import Config, RunConfig, Start
from taming_dist.stages.prior import TokenLossConfig
from taming_dist.training.clock import Clock
from taming_dist.training.loop import fit
from taming_dist.training.optimization import OptimConfig
from taming_dist.training.run import LoopConfig, Run
from taming_dist.training.signals import StopRequest
from taming_dist.training.sinks import Sinks

SIZES = ("probe_layers", "probe_width", "probe_images")
OF_SAMPLES = ("vqgan", "reference", "features")
READING = ("threads", "max_bad_fraction")
PLAIN = ("probe", "train", "data", "out", "batch", "seed", "precision", "n")
KEYS = (*PLAIN, *SIZES, *OF_SAMPLES, *READING)  # all that a probe can be told
FOLDER = ".probe"  # within `out`, while it trains


@dataclasses.dataclass(frozen=True)
class Real:
    """The images that samples are compared with, and how; `vqgan`: the fingerprint of the export
    that decodes the samples."""

    network: Inception
    reference: Reference
    intake: Intake
    vqgan: str


def run_probe(
    config: EvaluateConfig, world: World, sampling: Sampling, recipe: ProbeRecipe | None = None
) -> Measured:
    """The figures of a transformer trained on codes of `config.train`, on those of `config.data`,
    and of the `n` images that `sampling` makes with it, if that is asked for (collective; the ranks
    have to be in a process group, also a single one). `recipe`: None: that of the command's sizes.

    Raises:
        UserError: code shards, settings, a reference or a folder that cannot be used.
        Diverged: training has.
    """
    recipe = recipe or recipe_for(config)
    train, val = open_codes(config, recipe, world)
    real = open_real(config, train, world)
    out = Path(config.out)
    prepare_folder(out, world)
    facts = {"kind": "probe", "images": val.num_samples, "training_images": train.num_samples}
    facts |= {"tokenizer": train.tokenizer_fingerprint, "vocabulary": train.vocabulary}
    tokens = train.grid[0] * train.grid[1]
    probed = Probed(Measured(facts | {"tokens": tokens}), train, recipe)
    with training_folder(out, world) as folder:
        with torch.inference_mode(False):
            export = trained(config, train, recipe, folder, world)
        transformer = Transformer.from_pretrained(export).to(world.device)
        add_likelihoods(probed, predictions(transformer, val, config.batch, world), val)
        if real is not None:
            asked = dataclasses.replace(config, model=str(export))
            add_samples(probed, sampling(asked, transformer, world), real, world)
    return probed.measured


def add_likelihoods(probed: Probed, found: dict[str, float], val: CodeDataset) -> None:
    """Add what `predictions` has found on codes. Beside the likelihood there is the entropy of
    single codes, which it has to stay below."""
    tokens, found_by = val.grid[0] * val.grid[1], protocol_of(val)
    probed.add("nll", tokens * found["val_nll"], found_by)
    probed.add("nll_per_token", found["val_nll"], found_by)
    probed.add("unigram_entropy", tokens * found["unigram_entropy"], found_by)
    if "val_bits_per_dim" in found:
        probed.add("bits_per_dim", found["val_bits_per_dim"], found_by)


def protocol_of(val: CodeDataset) -> Protocol:
    """How codes are predicted: which images these are of is part of it, and which codes not."""
    count, origin = val.num_samples, val.origin
    asked = (origin.fingerprint, val.image_size, origin.views, origin.resize)
    return Protocol(count, count, *asked, "float32")


def add_samples(probed: Probed, samples: Source, real: Real, world: World) -> None:
    """Have the first rank add the distances of samples from real images (collective)."""
    made = features_of(samples, real.network, real.intake, world)[FEATURES]
    if world.is_first:
        distances = Measured({})
        add_distances(distances, made, real.reference, real.intake.size, real.network)
        probed.measured.facts |= {"samples": len(made), "vqgan_fingerprint": real.vqgan}
        for name, value in distances.figures.items():
            probed.add(name, value, distances.protocol(name))


def open_real(config: EvaluateConfig, train: CodeDataset, world: World) -> Real | None:
    """What samples will be compared with; None if there are to be none (collective). All of it is
    read before training, which takes long.

    Raises:
        UserError: something for it is missing, or of another tokenizer, or there are too few.
    """
    if config.n is None:
        refuse(config, OF_SAMPLES, "it is for samples, whose FID is measured: give n=, too")
        return None
    if not config.vqgan:
        raise UserError("vqgan=... is missing: the export whose codes these are decodes samples")
    if config.reference is None:
        raise UserError("reference=... is missing: the real images that samples are compared with")
    if config.features == "none":
        raise UserError("features=none: samples are compared by features, leave it or n= out")
    vqgan = VQGAN.from_pretrained(config.vqgan)
    if not vqgan.wrote(train.tokenizer_fingerprint):
        raise UserError(
            f"vqgan: its fingerprint is {vqgan.tokenizer_fingerprint}, but the codes of train are "
            f"of {train.tokenizer_fingerprint}: give the export that made them"
        )
    if train.image_size is None:
        raise UserError("train: its manifest does not say the size of its images: tokenize again")
    weights = "random" if config.features == "random" else "pretrained"
    network = inception(weights).to(world.device)
    intake = Intake(config.batch, train.image_size, config.threads, config.max_bad_fraction)
    reference = open_reference(config.reference, network, intake, world)
    counts = {"n": config.n}
    if reference.features is not None:
        counts["reference"] = reference.images
    for key, count in counts.items():
        if count < LEAST:
            raise UserError(f"{key}: {count} images are too few, use {LEAST} or more")
    return Real(network, reference, intake, vqgan.fingerprint)


def open_codes(
    config: EvaluateConfig, recipe: ProbeRecipe, world: World
) -> tuple[CodeDataset, CodeDataset]:
    """The codes to train on and those to predict.

    Raises:
        UserError: they are missing, too few or of two tokenizers, or the command has other keys.
    """
    for name in given(config):
        if name not in KEYS:
            raise UserError(f"{name}: a probe has no use for it, leave it out")
    if recipe.batch % world.world_size:
        raise UserError(
            f"probe: {world.world_size} ranks cannot share its batches of {recipe.batch} images "
            f"equally: start as many as divide {recipe.batch}"
        )
    train, val = (codes_of(config, name, recipe) for name in ("train", "data"))
    if train.tokenizer_fingerprint != val.tokenizer_fingerprint:
        raise UserError(
            f"train and data are codes of two tokenizers, {train.tokenizer_fingerprint} and "
            f"{val.tokenizer_fingerprint}: give those of one"
        )
    for name in ("vocabulary", "grid", "image_size", "class_names"):
        one, other = getattr(train, name), getattr(val, name)
        if one != other:
            raise UserError(
                f"train and data differ in their {name.replace('_', ' ')}, {one} and {other}: "
                f"tokenize both alike"
            )
    return train, val


def codes_of(config: EvaluateConfig, name: str, recipe: ProbeRecipe) -> CodeDataset:
    """The code shards that a key names."""
    spec = getattr(config, name)
    if not spec:
        raise UserError(
            f"{name}=... is missing: a probe is trained on the code shards of train= and measured "
            f"on those of data="
        )
    try:
        found = CodeDataset.open(spec)
    except UserError as error:
        raise UserError(
            f"{name}: {error} (code shards come from: python tools/tokenize_dataset.py)"
        ) from error
    if found.num_samples < recipe.batch:
        raise UserError(
            f"{name}: {found.num_samples} samples are fewer than a batch of a probe, "
            f"{recipe.batch}: give more"
        )
    if not found.origin.fingerprint:
        raise UserError(f"{name}: its manifest does not say of which images it is: tokenize again")
    return found


@contextmanager
def training_folder(out: Path, world: World) -> Iterator[Path]:
    """A folder in `out` for what training writes, which is removed at any end, and what an earlier
    one that was killed has left (collective)."""
    folder = out / FOLDER

    def remove() -> None:
        if world.is_first:
            shutil.rmtree(folder, ignore_errors=True)

    remove()
    world.barrier()  # before others look there
    try:
        yield folder
    finally:
        remove()


def trained(
    config: EvaluateConfig, train: CodeDataset, recipe: ProbeRecipe, folder: Path, world: World
) -> Path:
    """The export of a transformer that was trained by the recipe (collective)."""
    asked = training_config(config, train, recipe, folder)
    batch = batch_sizes(recipe.batch, config.batch, world.world_size)
    here = Place(world.rank, world.world_size, world.local_rank)
    start = Start(here, batch, folder)
    opened = stage_of(asked).open_data(asked, start)
    clock = Clock(recipe.batch, asked.train.steps)
    steps = iter(range(clock.total_steps))
    share = recipe.batch // world.world_size
    told = with_progress(steps, clock.total_images, world, lambda _: share, "trained on ")
    run = Run(
        recipe=recipe_of(asked, start, opened, world),
        data=opened.data,
        clock=clock,
        config=asked.train,
        checkpoints=Checkpoints(folder / "checkpoints", world),
        sinks=Sinks(None, []),
        world=world,
        folder=folder,
        step_done=lambda: advance(told),
    )
    fit(run, StopRequest())
    if world.is_first:
        forget_outcome()  # of training, which is not that of the command
    return run.export


def advance(told: Iterator[int]) -> None:
    """Tell of one more step."""
    next(told, None)


def training_config(
    config: EvaluateConfig, train: CodeDataset, recipe: ProbeRecipe, folder: Path
) -> Config:
    """The configuration of a run that trains on these codes by the recipe."""
    return Config(
        run=RunConfig(name="probe", dir=str(folder), seed=recipe.seed),
        train=LoopConfig(
            steps=recipe.images // recipe.batch,
            log_every=0,
            checkpoint_every=0,
            validate_every=0,
            validate_images=recipe.batch,  # the loop validates at its end, and we measure all
            preview_every=0,
            preview_images=1,
            best=None,
        ),
        model=TransformerConfig(
            vocabulary=train.vocabulary,
            grid=list(train.grid),
            layers=recipe.layers,
            heads=recipe.heads,
            width=recipe.width,
            condition="none",
            block=recipe.block,
            order=recipe.order,
            scheme=recipe.scheme,
        ),
        loss=TokenLossConfig(),
        data=CodesConfig(
            train=config.train,
            val=config.data,
            global_batch=recipe.batch,
            micro_batch=config.batch,
            lanes=recipe.batch,
            block=recipe.reading_block,
        ),
        optim=OptimConfig(
            name=recipe.optimizer,
            lr=recipe.lr,
            betas=list(recipe.betas),
            weight_decay=recipe.weight_decay,
            clip=recipe.clip,
            schedule=recipe.schedule,
            warmup_images=recipe.warmup_images,
            final=recipe.final,
        ),
        engine=EngineConfig(precision=recipe.precision),
    )
