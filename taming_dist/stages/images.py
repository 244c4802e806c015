"""The images of a first stage: what data.train and data.val name, as the readers of a run."""

from collections.abc import Callable, Mapping
from typing import Any

from taming_dist.data.images import Preprocess
from taming_dist.data.mixture import resolve_training
from taming_dist.data.reader import ImagesConfig, Reader
from taming_dist.data.streaming import StreamingReader, stream_locations
from taming_dist.errors import UserError
from taming_dist.formats.manifest import Dataset, resolve
from taming_dist.launch import ALONE, Place
from taming_dist.models.vqgan import VQGANConfig
from taming_dist.stages.interface import Config, Start, part
from taming_dist.stages.opening import join
from taming_dist.training.loop import Data
from taming_dist.training.sinks import append_line

OnBad = Callable[[dict[str, Any]], None]


def open_images(config: Config, start: Start) -> Data:
    """The readers of a first stage: the column that its modality reads, without classes."""
    batch, here = start.batch, start.here
    data = part(config.data, ImagesConfig)

    def note_bad(record: dict[str, Any]) -> None:
        append_line(start.run_dir / "bad_samples.jsonl", record)

    train = open_training(config, here, batch.micro_batch, note_bad)
    val_set, centred = resolve_images(data, "val"), Preprocess(data.size)
    most = config.train.validate_images
    val = open_indexed(config, val_set, centred, here, batch.micro_batch, note_bad, most)
    # nothing is written before the start: validation reports what it cannot read
    unread: list[dict[str, Any]] = []
    few = config.train.preview_images
    shown = open_indexed(config, val_set, centred, ALONE, few, unread.append)
    return join(train, val, shown, batch, unread)


def open_training(
    config: Config, here: Place, micro_batch: int, on_bad: OnBad
) -> Reader | StreamingReader:
    """The reader of data.train: by its index, or with data.streaming=true in sequence."""
    data = part(config.data, ImagesConfig)
    if not data.streaming:
        dataset = resolve_images(data, "train")
        return open_indexed(config, dataset, data.preprocess(), here, micro_batch, on_bad)
    try:
        locations = stream_locations(data.train, data.allow_pipe)
    except UserError as error:
        raise UserError(f"data.train: {error}") from error
    return StreamingReader(
        locations,
        data.preprocess(),
        seed=config.run.seed,
        rank=here.rank,
        world_size=here.world_size,
        micro_batch=micro_batch,
        columns=columns(config),
        with_classes=False,
        threads=data.threads,
        on_bad=on_bad,
        max_bad_fraction=data.max_bad_fraction,
        damaged=data.damaged,
    )


def open_indexed(
    config: Config,
    dataset: Dataset,
    preprocess: Preprocess,
    here: Place,
    micro_batch: int,
    on_bad: OnBad,
    most_evaluated: int = 0,
) -> Reader:
    """The reader of shards that have an index."""
    data = part(config.data, ImagesConfig)
    return Reader(
        dataset,
        preprocess,
        seed=config.run.seed,
        lanes=data.lanes,
        block=data.block,
        rank=here.rank,
        world_size=here.world_size,
        micro_batch=micro_batch,
        most_evaluated=most_evaluated,
        columns=columns(config),
        with_classes=False,
        threads=data.threads,
        on_bad=on_bad,
        max_bad_fraction=data.max_bad_fraction,
        damaged=data.damaged,
    )


def columns(config: Config) -> list[str]:
    """What the modality reads."""
    return [part(config.model, VQGANConfig).modality.column]


def resolve_images(data: ImagesConfig, name: str) -> Dataset:
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
