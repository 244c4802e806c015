"""What all workers of a tokenization agree on: models, images, and the contents of each shard."""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from taming_dist.errors import UserError
from taming_dist.formats.manifest import Dataset, fingerprint
from taming_dist.models.vqgan import VQGAN
from taming_dist.prepare.tokenization.texts import Texts
from taming_dist.prepare.tokenization.views import Views


@dataclass(frozen=True)
class Part:
    """One output shard and the source samples [start, stop) whose codes it holds."""

    path: Path
    start: int
    stop: int

    @property
    def name(self) -> str:
        """The shard's name without the extension."""
        return self.path.stem


@dataclass(frozen=True)
class Job:
    """The assignment of images to code shards: the same command gives the same job everywhere.

    Shard k holds the samples from k * `shard_samples` on, whatever the number of workers.
    `condition_model` encodes what the transformer is conditioned on, for example label maps, scaled
    to a side of `condition_size` pixels (None: those of the image) by nearest neighbour.
    `coordinates` and `boxes`: also store where each view lies in its image, and where the objects
    lie in each view. `classes`: store the class of each image, if all images have one. `texts`:
    store the embedding of the text of each image.
    """

    model: VQGAN
    condition_model: VQGAN | None
    dataset: Dataset
    views: Views
    size: int
    precision: str
    out: Path
    prefix: str
    shard_samples: int
    coordinates: bool = False
    boxes: bool = False
    classes: bool = True
    condition_size: int | None = None
    texts: Texts | None = None

    @cached_property
    def parts(self) -> list[Part]:
        """The output shards in order."""
        last = self.dataset.num_samples
        starts = range(0, last, self.shard_samples)
        return [
            Part(
                self.out / f"{self.prefix}-{number:06d}.tar",
                start,
                min(start + self.shard_samples, last),
            )
            for number, start in enumerate(starts)
        ]

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The facts about models and preprocessing that all shards of this job share."""
        settings: dict[str, Any] = {
            "tokenizer": {"fingerprint": self.model.tokenizer_fingerprint},
            "vocab": self.model.config.vocabulary,
            "preprocessing": {
                "size": self.size,
                "square": self.views.square,
                "resize": "short side, lanczos",
                "crop": "center",
                "views": self.views.names,
                "precision": self.precision,
            },
        }
        # Stated only where they are written, so that shards older than these columns stay valid.
        for name in ("coordinates", "boxes"):
            if getattr(self, name):
                settings["preprocessing"][name] = True
        if not self.classes:
            settings["preprocessing"]["classes"] = False
        if self.condition_model is not None:
            settings["condition"] = {
                "fingerprint": self.condition_model.tokenizer_fingerprint,
                "vocab": self.condition_model.config.vocabulary,
                "grid": self.code_shape(self.condition_model),
            }
            if self.condition_size is not None:
                settings["condition"]["size"] = self.condition_size
        if self.texts is not None:
            settings["text"] = self.texts.facts
            settings["preprocessing"]["text"] = self.texts.column
        return settings

    def side(self, model: VQGAN) -> int:
        """The side in pixels of what a model encodes of a crop."""
        if model is self.condition_model and self.condition_size is not None:
            return self.condition_size
        return self.size

    def code_shape(self, model: VQGAN) -> list[int]:
        """The shape of the codes that a model gives a crop."""
        side = self.side(model)
        return list(model.config.code_shape(side, side))

    def facts(self, part: Part) -> dict[str, Any]:
        """The facts of a shard of this job, except those that depend on its images."""
        return self.settings | {"source": self.source(part.start, part.stop)}

    def source(self, start: int, stop: int) -> dict[str, Any]:
        """Where the samples [start, stop) come from.

        The fingerprint covers the image shards that hold them, so it stays the same when shards
        are appended to the data set.
        """
        ends = np.cumsum(self.dataset.samples_per_shard)
        first, last = np.searchsorted(ends, [start, stop - 1], side="right")
        before = int(ends[first] - self.dataset.samples_per_shard[first])
        touched = fingerprint(self.dataset.shards[first : last + 1])
        facts = json.dumps([start - before, touched])
        return {
            "fingerprint": hashlib.sha256(facts.encode()).hexdigest(),
            "range": [start, stop],
            "shards": [self.dataset.shards[first].name, self.dataset.shards[last].name],
        }

    def is_of(self, part: Part, found: dict[str, Any]) -> bool:
        """Whether a shard's facts are those of `part`.

        False if they cover only its beginning, as left by the same job on fewer images;
        `UserError` if they are another job's.
        """
        for name in ("tokenizer", "condition", "text", "vocab", "preprocessing"):
            mine = self.settings.get(name)
            if found.get(name) != mine:
                raise UserError(
                    f"{part.path} holds codes with the {name} {found.get(name)}, but this command "
                    f"requires {mine}: {self._fix}"
                )
        start, stop = found["source"]["range"]
        if start != part.start or not part.start < stop <= part.stop:
            raise UserError(
                f"{part.path} holds the images {start} to {stop}, but with these --shards and "
                f"--shard-samples it should hold {part.start} to {part.stop}: {self._fix}"
            )
        theirs, mine = found["source"], self.source(start, stop)
        if theirs["fingerprint"] != mine["fingerprint"]:
            raise UserError(
                f"{part.path} holds codes of other images: {theirs.get('shards')} with the "
                f"fingerprint {theirs['fingerprint']}, but --shards has {mine['shards']} "
                f"with {mine['fingerprint']}: {self._fix}"
            )
        return bool(stop == part.stop)

    @property
    def _fix(self) -> str:
        return f"choose another --out, or delete {self.out} and run this command again"
