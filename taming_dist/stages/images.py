"""Images: what data.train and data.val name, as the readers of a run."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from taming_dist.data.decoding import Extra
from taming_dist.data.images import Preprocess
from taming_dist.data.mixture import resolve_training
from taming_dist.data.reader import ImagesConfig, Reader, Reading
from taming_dist.data.streaming import StreamingReader, stream_locations
from taming_dist.errors import UserError
from taming_dist.formats.manifest import Dataset, resolve
from taming_dist.stages.interface import Config, Start, part
from taming_dist.stages.opening import join
from taming_dist.training.run import Data
from taming_dist.training.sinks import append_line


def open_images(
    config: Config,
    start: Start,
    columns: Sequence[str],
    with_classes: bool = False,
    extra: Extra | None = None,
    encoders: tuple[str, ...] = (),
) -> Data:
    """The readers of a run on images, of the `columns` that its networks read: cropped as data.crop
    says in training, else in the centre. `with_classes`, `extra`, `encoders`: see `Reader`."""
    batch, here = start.batch, start.here
    data = part(config.data, ImagesConfig)

    def note_bad(record: dict[str, Any]) -> None:
        append_line(start.run_dir / "bad_samples.jsonl", record)

    reading = Reading(
        data.preprocess(),
        batch.micro_batch,
        seed=config.run.seed,
        rank=here.rank,
        world_size=here.world_size,
        columns=columns,
        with_classes=with_classes,
        threads=data.threads,
        on_bad=note_bad,
        max_bad_fraction=data.max_bad_fraction,
        damaged=data.damaged,
    )
    train = open_training(data, reading, extra, encoders)
    val_set = resolve_images(data, "val")
    centred = replace(reading, preprocess=Preprocess(data.size))
    most = config.train.validate_images
    val = Reader(val_set, centred, most_evaluated=most, extra=extra)
    # nothing is written before the start: validation reports what it cannot read
    unread: list[dict[str, Any]] = []
    few = config.train.preview_images
    alone = replace(centred, micro_batch=few, rank=0, world_size=1, on_bad=unread.append)
    return join(train, val, Reader(val_set, alone, extra=extra), batch, unread)


def open_training(
    data: ImagesConfig,
    reading: Reading,
    extra: Extra | None = None,
    encoders: tuple[str, ...] = (),
) -> Reader | StreamingReader:
    """The reader of data.train: by its index, or with data.streaming=true in sequence, where
    nothing but pixels and classes can be read."""
    if not data.streaming:
        dataset = resolve_images(data, "train")
        order = {"lanes": data.lanes, "block": data.block}
        return Reader(dataset, reading, **order, extra=extra, encoders=encoders)
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
