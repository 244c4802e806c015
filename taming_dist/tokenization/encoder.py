"""From the images of a part to its code shard."""

import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from taming_dist.data.code_shards import CodeShard, codes_dtype
from taming_dist.data.images import Preprocess
from taming_dist.data.reader import Batch, Reader
from taming_dist.models.vqgan import VQGAN
from taming_dist.tokenization.job import Job, Part
from taming_dist.tokenization.progress import Progress


class Encoder:
    """Encodes parts of a job on `device`, `batch` images at a time.

    Every batch has the same shape, filled up where images are missing, so that a code depends on
    its image, its place in the part and `batch`, not on its neighbours. In fp32 no TF32 is used.
    """

    def __init__(
        self, job: Job, device: torch.device, batch: int, threads: int, progress: Progress
    ) -> None:
        self.job, self.device, self.batch, self.progress = job, device, batch, progress
        torch.backends.cudnn.allow_tf32 = False
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.deterministic = True
        self.models = (
            [job.model] if job.condition_model is None else [job.model, job.condition_model]
        )
        for model in self.models:
            model.to(device).eval()
        self._bad: list[dict[str, Any]] = []
        self.reader = Reader(
            job.dataset,
            Preprocess(job.views.square),
            columns=sorted({name for model in self.models for name in model.config.modality.files}),
            micro_batch=batch,
            threads=threads,
            on_bad=self._bad.append,
            max_bad_fraction=1.0,
        )

    def encode(self, part: Part) -> CodeShard:
        """Read and encode the images of a part; those that cannot be read have no row."""
        self._bad.clear()
        batches: list[Batch] = []
        codes: list[list[Tensor]] = []
        for batch in self._waited(self.reader.epoch_batches(part.start, part.stop)):
            if codes:
                # One batch behind, so that a GPU has the next one before this waits for it.
                codes[-1] = [column.cpu() for column in codes[-1]]
            codes.append([self.codes(model, batch, self.job.precision) for model in self.models])
            batches.append(batch)
            self.progress.advance(len(batch))
        for record in self._bad:
            print(f"left out: {record['key']} in {record['shard']}: {record['error']}", flush=True)
        return self._shard(part, batches, codes)

    def inputs(self, model: VQGAN, batch: Batch) -> Iterator[Tensor]:
        """Each view of a batch as a model takes it, [b, c, size, size] on the device."""
        modality = model.config.modality
        column = getattr(batch, modality.column)
        modality.check(column)
        views = self.job.views.cut(column.to(self.device, non_blocking=True), batch.ids)
        return map(modality.tensor, views)

    @torch.inference_mode()
    def codes(self, model: VQGAN, batch: Batch, precision: str) -> Tensor:
        """Codes int32 [b, views, i, j] that a model gives a batch, on the device."""
        views = self.inputs(model, batch)
        return torch.stack([self._encode(model, view, precision) for view in views], 1)

    def _encode(self, model: VQGAN, view: Tensor, precision: str) -> Tensor:
        missing = view.new_zeros(self.batch - len(view), *view.shape[1:])
        with torch.autocast(self.device.type, torch.bfloat16, enabled=precision == "bf16"):
            codes = model.encode(torch.cat([view, missing]))
        return codes[: len(view)].to(torch.int32)

    def _waited(self, batches: Iterator[Batch]) -> Iterator[Batch]:
        """The batches; the time spent waiting for them goes to the progress."""
        while True:
            start = time.monotonic()
            batch = next(batches, None)
            self.progress.waited(time.monotonic() - start)
            if batch is None:
                return
            yield batch

    def _shard(self, part: Part, batches: list[Batch], codes: list[list[Tensor]]) -> CodeShard:
        facts = self.job.facts(part)
        facts["source"]["bad"] = [
            {"shard": Path(record["shard"]).name, "key": record["key"], "offset": record["offset"]}
            for record in self._bad
        ]
        classes = [batch.classes for batch in batches if batch.classes is not None]
        ids = [batch.ids for batch in batches]
        return CodeShard(
            facts,
            codes=self._stored(self.job.model, [columns[0] for columns in codes]),
            sources=_joined(ids, np.int64),
            keys=[key for batch in batches for key in batch.keys],
            classes=_joined(classes, np.int32) if self.reader.has_classes else None,
            conditions=self._stored(self.job.condition_model, [columns[1] for columns in codes])
            if self.job.condition_model is not None
            else None,
        )

    def _stored(self, model: VQGAN, codes: list[Tensor]) -> np.ndarray:
        """The codes of a model as they are stored, [n, views, i, j]."""
        shape = (0, len(self.job.views.names), *self.job.grid(model))
        joined = torch.cat([torch.empty(shape, dtype=torch.int32), *(c.cpu() for c in codes)])
        return joined.numpy().astype(codes_dtype(model.config.vocabulary))


def _joined(columns: list[Tensor], dtype: Any) -> np.ndarray:
    return np.concatenate([np.empty(0, dtype), *(c.numpy() for c in columns)]).astype(dtype)


def psnr(squared_errors: list[float]) -> float | None:
    """PSNR in dB of the mean of squared errors of pixels in [0, 1]; None without any."""
    if not squared_errors:
        return None
    mean = sum(squared_errors) / len(squared_errors)
    return -10 * math.log10(mean) if mean > 0 else math.inf
