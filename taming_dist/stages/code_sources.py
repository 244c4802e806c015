"""Where a prior's codes come from: code shards, or images that are encoded as they are read."""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Generic, TypeVar

from taming_dist.data.batching import DataConfig
from taming_dist.data.codes import CodeDataset, CodeReader, CodesConfig
from taming_dist.data.online import OnlineCodes, OnlineConfig
from taming_dist.errors import UserError
from taming_dist.formats.code_shards import CLASSES, CONDITIONS
from taming_dist.models.prior.conditions import Codes
from taming_dist.models.vqgan import VQGAN
from taming_dist.stages.images import open_images, resolve_images
from taming_dist.stages.interface import Config, Start, part
from taming_dist.stages.online import Encoder
from taming_dist.stages.opening import join
from taming_dist.training.run import Data

CodesT = TypeVar("CodesT", bound=Codes)


class CodeSource(ABC, Generic[CodesT]):
    """What a prior is trained on, with the `columns` that its condition reads.

    `encoder` makes codes of what the readers give (None: they give codes).

    Raises:
        UserError: what is to encode is missing.
    """

    encoder: Encoder | None = None

    def __init__(self, config: Config, columns: Sequence[str]) -> None:
        self.config, self.columns = config, tuple(columns)
        self._found: dict[str, CodesT] = {}

    def codes(self, name: str) -> CodesT:
        """What the codes of data.train or data.val are; UserError if they are missing."""
        if name not in self._found:
            self._found[name] = self._find(name)
        return self._found[name]

    @abstractmethod
    def _find(self, name: str) -> CodesT:
        """What `codes` gives, looked up once."""

    @abstractmethod
    def open(self, start: Start) -> Data:
        """The readers.

        Raises:
            UserError: there is no such column, or too few samples.
        """

    @abstractmethod
    def decoder(self) -> VQGAN | None:
        """The VQGAN that draws the previews; None: there are none.

        Raises:
            UserError: it is not the one that wrote the codes.
        """

    @abstractmethod
    def condition_decoder(self) -> VQGAN | None:
        """The VQGAN that draws what a condition has codes of; None: it is not drawn.

        Raises:
            UserError: it is not the one that wrote the codes.
        """


class CodeShards(CodeSource[CodeDataset]):
    """The code shards of data.train and data.val."""

    def __init__(self, config: Config, columns: Sequence[str]) -> None:
        super().__init__(config, columns)
        self.data = part(config.data, CodesConfig)

    def _find(self, name: str) -> CodeDataset:
        return open_codes(self.data, name)

    def open(self, start: Start) -> Data:
        data, batch, here, columns = self.data, start.batch, start.here, self.columns
        train = CodeReader(
            self.codes("train"),
            seed=self.config.run.seed,
            lanes=data.lanes,
            block=data.block,
            rank=here.rank,
            world_size=here.world_size,
            micro_batch=batch.micro_batch,
            columns=columns,
        )
        val = CodeReader(
            self.codes("val"),
            rank=here.rank,
            world_size=here.world_size,
            micro_batch=batch.micro_batch,
            most_evaluated=self.config.train.validate_images,
            columns=columns,
        )
        few = self.config.train.preview_images
        shown = CodeReader(self.codes("val"), micro_batch=few, columns=columns)
        return join(train, val, shown, batch)

    def decoder(self) -> VQGAN | None:
        wrote = self.codes("train").tokenizer_fingerprint
        return open_decoder("data.vqgan", self.data.vqgan, self.data.train, wrote)

    def condition_decoder(self) -> VQGAN | None:
        condition = self.codes("train").condition
        if not self.data.vqgan or CONDITIONS not in self.columns or condition is None:
            return None  # there are no previews, or nothing of the condition to draw
        given, wrote = self.data.condition_vqgan, condition["fingerprint"]
        return open_decoder("data.condition_vqgan", given, self.data.train, wrote)


class OnlineImages(CodeSource[OnlineCodes]):
    """The images of data.train and data.val, with the VQGANs that encode them."""

    encoder: Encoder

    def __init__(self, config: Config, columns: Sequence[str]) -> None:
        data = part(config.data, OnlineConfig)
        self._vqgan = open_vqgan("data.vqgan", data.vqgan)
        self._condition = None
        if CONDITIONS in columns:
            if not data.condition_vqgan:
                raise UserError(
                    "data.condition_vqgan: model/condition=codes needs the export of the VQGAN "
                    "whose codes it reads: give it"
                )
            self._condition = open_vqgan("data.condition_vqgan", data.condition_vqgan)
        self._size = data.size or self._vqgan.config.resolution
        for model in filter(None, (self._vqgan, self._condition)):
            model.config.code_shape(self._size, self._size, "data.size")
        sized = dataclasses.replace(data, size=self._size)
        super().__init__(dataclasses.replace(config, data=sized), columns)
        self.encoder = Encoder(self._vqgan, self._condition, columns, data.precision)

    def _find(self, name: str) -> OnlineCodes:
        images = resolve_images(part(self.config.data, OnlineConfig), name)
        return OnlineCodes(images, self._size, self._vqgan, self._condition)

    def open(self, start: Start) -> Data:
        codes = self.codes("train")
        for each in (codes, self.codes("val")):
            each.require(self.columns)
        return open_images(
            self.config,
            start,
            self.encoder.reads,
            with_classes=CLASSES in self.columns,
            extra=codes.extra(self.columns),
            encoders=codes.fingerprints,
        )

    def decoder(self) -> VQGAN | None:
        return self._vqgan

    def condition_decoder(self) -> VQGAN | None:
        return self._condition


# the `data` group of a prior -> where its codes come from
SOURCES: dict[type[DataConfig], type[CodeShards] | type[OnlineImages]] = {
    CodesConfig: CodeShards,
    OnlineConfig: OnlineImages,
}


def open_vqgan(key: str, folder: str) -> VQGAN:
    """The VQGAN of an export; UserError naming the key."""
    try:
        vqgan: VQGAN = VQGAN.from_pretrained(folder)
    except UserError as error:
        raise UserError(f"{key}: {error}") from error
    return vqgan


def open_decoder(key: str, folder: str, codes: str, fingerprint: str) -> VQGAN | None:
    """The VQGAN of an export, without its encoder; None where none is named. `key` names the
    export, `codes` what the VQGAN with the `fingerprint` wrote.

    Raises:
        UserError: it is another one.
    """
    if not folder:
        return None
    vqgan = open_vqgan(key, folder)
    if not vqgan.wrote(fingerprint):
        raise UserError(
            f"{key}={folder} has the fingerprint {vqgan.tokenizer_fingerprint}, but the codes of "
            f"{codes} were written by {fingerprint}: tokenize again, or name that VQGAN"
        )
    del vqgan.encoder
    return vqgan


def open_codes(data: CodesConfig, name: str) -> CodeDataset:
    """The code shards of data.train or data.val."""
    try:
        return CodeDataset.open(getattr(data, name), data.in_memory)
    except UserError as error:
        raise UserError(
            f"data.{name}: {error} (code shards come from: python tools/tokenize_dataset.py)"
        ) from error
