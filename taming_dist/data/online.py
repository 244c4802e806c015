"""Images that are encoded as they are read: what is read of them, and what their codes will be.

Code shards have the same columns under the same names; the codes themselves come from the rank's
device (`stages.online`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from omegaconf import MISSING
from torch import Tensor

from taming_dist.data.code_columns import COLUMNS
from taming_dist.data.decoding import Extra, check_objects, choose_class_column, read_objects
from taming_dist.data.reader import Batch, ImagesConfig
from taming_dist.data.texts import check_texts, find_embeddings, reader_of
from taming_dist.errors import UserError
from taming_dist.formats.code_shards import BOXES, CLASSES, CONDITIONS, CROPS, TEXTS
from taming_dist.formats.manifest import Dataset
from taming_dist.formats.objects import boxes_in_views
from taming_dist.models.vqgan import VQGAN
from taming_dist.ranges import check_choice, ranged

PRECISIONS = ("fp32", "bf16")


@dataclass
class OnlineConfig(ImagesConfig):
    """The `data` group of a prior on images whose pixels change from epoch to epoch.

    `vqgan`: export that encodes the images and decodes the previews. `condition_vqgan`: export that
    encodes what model/condition=codes reads. `precision` of both encoders: fp32 (exact, without
    TF32, whatever the engine has), or bf16; the quantizer compares in fp32. `size` 0: the VQGAN's
    resolution.
    """

    vqgan: str = MISSING
    condition_vqgan: str = ""
    precision: str = "fp32"
    size: int = ranged(0, at_least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("data.precision", self.precision, PRECISIONS)
        if self.streaming:
            raise UserError(
                "data.streaming=true: images that are encoded online are read by their index: "
                "leave it out (tools/index_shards.py makes the indexes)"
            )


def crops_of(batch: Batch) -> np.ndarray:
    """Where each image of a batch lies in its own, fp64 [b, 1, 5] (see `Views.crops`)."""
    crops = batch.crops.numpy()[:, None]
    # rounding must not push a crop over the edge of its image
    return np.concatenate([np.clip(crops[..., :4], 0, 1), crops[..., 4:]], axis=2)


def _classes(batch: Batch) -> dict[str, Tensor]:
    assert batch.classes is not None, "the data set was asked whether it has classes"
    return {CLASSES: batch.classes}


def _crops(batch: Batch) -> dict[str, Tensor]:
    return {CROPS: torch.from_numpy(crops_of(batch)[:, 0].astype(np.float32))}


def _boxes(batch: Batch) -> dict[str, Tensor]:
    seen = boxes_in_views(batch.extra[BOXES], crops_of(batch))
    return COLUMNS[BOXES].tensors(BOXES, seen)


def _texts(batch: Batch) -> dict[str, Tensor]:
    return {TEXTS: torch.from_numpy(np.stack(batch.extra[TEXTS]))}


# column of code shards -> the tensors that a batch of images has for it, on the CPU
KNOWN: dict[str, Callable[[Batch], dict[str, Tensor]]] = {
    CLASSES: _classes,
    CROPS: _crops,
    BOXES: _boxes,
    TEXTS: _texts,
}


def known_columns(batch: Batch, columns: Sequence[str]) -> dict[str, Tensor]:
    """The tensors of those of `columns` that need no encoder, as batches of code shards have
    them."""
    found: dict[str, Tensor] = {}
    for name in columns:
        found |= KNOWN[name](batch) if name in KNOWN else {}
    return found


class OnlineCodes:
    """What the codes of images will be, as code shards say it of theirs (see `Codes`).

    `fingerprints`: those of the VQGANs. `image_size`: the side of the images in pixels.
    """

    def __init__(
        self, dataset: Dataset, size: int, vqgan: VQGAN, condition_vqgan: VQGAN | None
    ) -> None:
        self._dataset = dataset
        self.image_size: int | None = size
        self.vocabulary = vqgan.config.vocabulary
        self.grid = vqgan.config.code_shape(size, size)
        self.tokenizer_fingerprint = vqgan.tokenizer_fingerprint
        self.fingerprints: tuple[str, ...] = (vqgan.fingerprint,)
        self.condition: Mapping[str, Any] | None = None
        if condition_vqgan is not None:
            self.condition = {
                "fingerprint": condition_vqgan.tokenizer_fingerprint,
                "vocab": condition_vqgan.config.vocabulary,
                "grid": list(condition_vqgan.config.code_shape(size, size)),
            }
            self.fingerprints += (condition_vqgan.fingerprint,)
        self.text: Mapping[str, Any] | None = None
        self._embeddings = find_embeddings(dataset)
        if self._embeddings is not None:
            tokens, width = check_texts(dataset, self._embeddings, "model/condition=text").shape
            self.text = {"fingerprint": "", "tokens": tokens, "width": width}
        self.class_names = dataset.classes
        self.num_classes = len(dataset.classes or ())

    @property
    def classes_present(self) -> bool:
        """Whether every image has a class."""
        return choose_class_column(self._dataset) is not None

    def check_classes(self) -> None:
        """Do nothing: an invalid class ends the reading."""

    def extra(self, columns: Sequence[str]) -> Extra:
        """What is read of each image's files for `columns`, beside its pixels and class."""
        found: dict[str, Any] = {BOXES: read_objects} if BOXES in columns else {}
        if TEXTS in columns and self.text is not None and self._embeddings is not None:
            shape = self.text["tokens"], self.text["width"]
            found[TEXTS] = reader_of(self._embeddings, shape)
        return found

    def require(self, columns: Sequence[str]) -> None:
        """Raise `UserError` if the images cannot give one of `columns`."""
        for name in columns:
            if name == BOXES:
                check_objects(self._dataset, "this condition")
            elif name == CONDITIONS and self.condition is None:
                raise UserError("data.condition_vqgan: the condition's codes need its VQGAN")
            elif name == CLASSES and not self.classes_present:
                raise UserError("not every image has a class: make shards with classes")
            elif name == TEXTS and self.text is None:
                raise UserError(
                    "model/condition=text with data=online reads embeddings (txt.npy) that image "
                    "shards have: make shards with them, or use data=codes"
                )
            elif name not in (*KNOWN, CONDITIONS):
                raise UserError(f"images give no column {name}: use data=codes")
