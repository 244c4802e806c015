"""Encoding the images of a part into its code shard."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from taming_dist.data.decoding import Extra, read_objects
from taming_dist.data.images import Preprocess
from taming_dist.data.reader import Batch, Reader, Reading
from taming_dist.data.texts import reader_of
from taming_dist.engine.tf32 import EXACT, use_tf32
from taming_dist.formats.code_shards import BOXES, TEXTS, CodeShard, codes_dtype
from taming_dist.formats.names import printable
from taming_dist.formats.objects import Boxes, boxes_in_views
from taming_dist.models.modalities import nearest
from taming_dist.models.vqgan import VQGAN, check_all_coded
from taming_dist.prepare.tokenization.job import Job, Part
from taming_dist.prepare.tokenization.progress import Progress


@dataclass
class _Rows:
    """What is kept of a batch: the codes of each model, and the images that they belong to.

    `crops` [b, views, 5], `boxes` of the b x views and `texts` [b, t, w]: None if they are not
    stored.
    """

    codes: list[Tensor]
    ids: Tensor
    keys: list[str]
    classes: Tensor | None
    crops: np.ndarray | None
    boxes: Boxes | None
    texts: Tensor | None


class Encoder:
    """Encoder of the parts of a job on `device`, `batch` images at a time.

    Every batch has the same shape, padded where images are missing, so that a code depends on its
    image, its place in the part and `batch`, not on its neighbours. fp32 means no TF32.
    """

    def __init__(
        self, job: Job, device: torch.device, batch: int, threads: int, progress: Progress
    ) -> None:
        self.job, self.device, self.batch, self.progress = job, device, batch, progress
        use_tf32(EXACT)
        torch.backends.cudnn.deterministic = True
        self.models = (
            [job.model] if job.condition_model is None else [job.model, job.condition_model]
        )
        for model in self.models:
            model.to(device).eval()
            if job.precision == "bf16" and device.type == "cuda":
                model.run_lean()
        if job.texts is not None and job.texts.encoder is not None:
            job.texts.encoder.to(device)
        self._bad: list[dict[str, Any]] = []
        reading = Reading(
            Preprocess(job.views.square),
            batch,
            columns=[model.config.modality.column for model in self.models],
            with_classes=job.classes,
            threads=threads,
            on_bad=self._bad.append,
            max_bad_fraction=1.0,
        )
        self.reader = Reader(job.dataset, reading, extra=_extra(job))

    def encode(self, part: Part) -> CodeShard:
        """Read and encode the images of a part; those that cannot be read have no row."""
        self._bad.clear()
        rows: list[_Rows] = []
        for batch in self._waited(self.reader.epoch_batches(part.start, part.stop)):
            codes = [self.codes(model, batch, self.job.precision) for model in self.models]
            if rows:
                # One batch behind, so that a GPU has work while this waits for finished results.
                rows[-1] = self._fetched(rows[-1])
            # Not the batch itself: the images of a whole part would not fit in memory.
            crops, boxes = self._places(batch)
            texts = self._texts(batch)
            rows.append(_Rows(codes, batch.ids, batch.keys, batch.classes, crops, boxes, texts))
            self.progress.advance(len(batch))
        rows[-1:] = map(self._fetched, rows[-1:])
        for record in self._bad:
            line = f"left out: {record['key']} in {record['shard']}: {record['error']}"
            print(printable(line), flush=True)
        return self._shard(part, rows)

    def _fetched(self, rows: _Rows) -> _Rows:
        """Rows with their codes on the CPU; `UserError` if an image has none."""
        texts = None if rows.texts is None else rows.texts.cpu()
        rows = replace(rows, codes=[column.cpu() for column in rows.codes], texts=texts)
        advice = "use --precision fp32, or another model"
        for column in rows.codes:
            check_all_coded(column, rows.keys, advice)
        return rows

    def inputs(self, model: VQGAN, batch: Batch) -> Iterator[Tensor]:
        """Yield each view of a batch as model input, [b, c, side, side] on the device."""
        modality, side = model.config.modality, self.job.side(model)
        for view in self.job.views.cut(modality.take(batch.columns, self.device), batch.ids):
            yield nearest(modality.tensor(view), (side, side))

    @torch.inference_mode()
    def codes(self, model: VQGAN, batch: Batch, precision: str) -> Tensor:
        """The codes that a model assigns to a batch, int32 [b, views, *shape] on the device."""
        views = self.inputs(model, batch)
        return torch.stack([self._encode(model, view, precision) for view in views], 1)

    def _encode(self, model: VQGAN, view: Tensor, precision: str) -> Tensor:
        missing = view.new_zeros(self.batch - len(view), *view.shape[1:])
        with torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bf16"):
            codes = model.encode(torch.cat([view, missing]))
        return codes[: len(view)].to(torch.int32)

    def _places(self, batch: Batch) -> tuple[np.ndarray | None, Boxes | None]:
        """The views' places in their images, and the objects in the views, if these are stored."""
        if not (self.job.coordinates or self.job.boxes):
            return None, None
        crops = self.job.views.crops(batch.crops.numpy(), batch.ids)
        boxes = boxes_in_views(batch.extra[BOXES], crops) if self.job.boxes else None
        return crops.astype(np.float32) if self.job.coordinates else None, boxes

    def _texts(self, batch: Batch) -> Tensor | None:
        """The embeddings of the images' texts, if these are stored."""
        if self.job.texts is None:
            return None
        return self.job.texts.embeddings(batch.extra[TEXTS], self.batch)

    def _waited(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """Yield the batches; report the time spent waiting for them to the progress line."""
        while True:
            start = time.monotonic()
            batch = next(batches, None)
            self.progress.waited(time.monotonic() - start)
            if batch is None:
                return
            yield batch

    def _shard(self, part: Part, rows: list[_Rows]) -> CodeShard:
        facts = self.job.facts(part)
        facts["source"]["bad"] = [
            {"shard": Path(record["shard"]).name, "key": record["key"], "offset": record["offset"]}
            for record in self._bad
        ]
        columns = [
            self._stored(model, [batch.codes[number] for batch in rows])
            for number, model in enumerate(self.models)
        ]
        classes = [batch.classes for batch in rows if batch.classes is not None]
        crops = [batch.crops for batch in rows if batch.crops is not None]
        boxes = [batch.boxes for batch in rows if batch.boxes is not None]
        no_crops = np.empty((0, len(self.job.views.names), 5), np.float32)
        return CodeShard(
            facts,
            codes=columns[0],
            sources=_joined([batch.ids for batch in rows], np.int64),
            keys=[key for batch in rows for key in batch.keys],
            classes=_joined(classes, np.int32) if self.reader.has_classes else None,
            conditions=columns[1] if len(columns) > 1 else None,
            crops=np.concatenate([no_crops, *crops]) if self.job.coordinates else None,
            boxes=Boxes.join(boxes) if self.job.boxes else None,
            texts=self._stored_texts(rows),
        )

    def _stored_texts(self, rows: list[_Rows]) -> np.ndarray | None:
        if self.job.texts is None:
            return None
        none = np.empty((0, *self.job.texts.shape), np.float16)
        return np.concatenate([none, *(r.texts.numpy() for r in rows if r.texts is not None)])

    def _stored(self, model: VQGAN, codes: list[Tensor]) -> np.ndarray:
        """A model's codes in their stored type, [n, views, *shape]."""
        shape = (0, len(self.job.views.names), *self.job.code_shape(model))
        joined = torch.cat([torch.empty(shape, dtype=torch.int32), *codes])
        return joined.numpy().astype(codes_dtype(model.config.vocabulary))


def _extra(job: Job) -> Extra:
    """What is read of each image beside its pixels and class."""
    extra: dict[str, Any] = {BOXES: read_objects} if job.boxes else {}
    if job.texts is not None:
        extra[TEXTS] = reader_of(job.texts.column, job.texts.shape)
    return extra


def _joined(columns: list[Tensor], dtype: Any) -> np.ndarray:
    return np.concatenate([np.empty(0, dtype), *(c.numpy() for c in columns)]).astype(dtype)


def psnr(squared_errors: list[float]) -> float | None:
    """PSNR in dB of the mean of squared errors for pixels in [0, 1]; None if there are none."""
    if not squared_errors:
        return None
    mean = sum(squared_errors) / len(squared_errors)
    return -10 * math.log10(mean) if mean > 0 else math.inf
