"""The images of a first stage: what data.train and data.val name, as the readers of a run."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from taming_dist.data.images import Preprocess
from taming_dist.data.mixture import resolve_training
from taming_dist.data.reader import ImagesConfig, Reader, Reading
from taming_dist.data.streaming import StreamingReader, stream_locations
from taming_dist.errors import UserError
from taming_dist.formats.manifest import Dataset, resolve
from taming_dist.models.vqgan import VQGANConfig
from taming_dist.stages.interface import Config, Start, part
from taming_dist.stages.opening import join
from taming_dist.training.loop import Data
from taming_dist.training.sinks import append_line


def open_images(config: Config, start: Start) -> Data:
    """The readers of a first stage: the column that its modality reads, without classes."""
    batch, here = start.batch, start.here
    data, model = part(config.data, ImagesConfig), part(config.model, VQGANConfig)

    def note_bad(record: dict[str, Any]) -> None:
        append_line(start.run_dir / "bad_samples.jsonl", record)

    reading = Reading(
        data.preprocess(),
        batch.micro_batch,
        seed=config.run.seed,
        rank=here.rank,
        world_size=here.world_size,
        columns=[model.modality.column],
        with_classes=False,
        threads=data.threads,
        on_bad=note_bad,
        max_bad_fraction=data.max_bad_fraction,
        damaged=data.damaged,
    )
    train = open_training(data, reading)
    val_set = resolve_images(data, "val")
    centred = replace(reading, preprocess=Preprocess(data.size))
    val = Reader(val_set, centred, most_evaluated=config.train.validate_images)
    # nothing is written before the start: validation reports what it cannot read
    unread: list[dict[str, Any]] = []
    few = config.train.preview_images
    alone = replace(centred, micro_batch=few, rank=0, world_size=1, on_bad=unread.append)
    return join(train, val, Reader(val_set, alone), batch, unread)


def open_training(data: ImagesConfig, reading: Reading) -> Reader | StreamingReader:
    """The reader of data.train: by its index, or with data.streaming=true in sequence."""
    if not data.streaming:
        dataset = resolve_images(data, "train")
        return Reader(dataset, reading, lanes=data.lanes, block=data.block)
    try:
        locations = stream_locations(data.train, data.allow_pipe)
    except UserError as error:
        raise UserError(f"data.train: {error}") from error
    return StreamingReader(locations, reading)


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
