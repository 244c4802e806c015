"""The texts of images as a column of code shards: encoded here, or as image shards have them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from taming_dist.data.texts import ARRAYS, check_texts
from taming_dist.errors import UserError
from taming_dist.formats.manifest import Dataset
from taming_dist.text_encoders import TextEncoder, open_text_encoder


@dataclass(frozen=True)
class Texts:
    """The column of image shards that has the texts, and the encoder of these; None: the column has
    embeddings, whose encoder nobody knows. `shape`: vectors of a text, and numbers in each."""

    column: str
    shape: tuple[int, int]
    encoder: TextEncoder | None = None

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What code shards say of them."""
        name, fingerprint = "", ""
        if self.encoder is not None:
            name, fingerprint = self.encoder.name, self.encoder.fingerprint
        tokens, width = self.shape
        return {"encoder": name, "fingerprint": fingerprint, "tokens": tokens, "width": width}

    def embeddings(self, found: Sequence[Any], batch: int) -> Tensor:
        """Embeddings float16 [b, tokens, width] of what was read of b images. Texts are encoded
        with others to fill up a batch, so that each depends on itself and `batch` only."""
        if self.encoder is None:
            return torch.from_numpy(np.stack(found))
        filled = [*found, *[""] * (batch - len(found))]
        return self.encoder.encode(filled)[: len(found)]


def open_texts(dataset: Dataset, column: str, encoder: str | None, tokens: int | None) -> Texts:
    """The texts of a column.

    Raises:
        UserError: images lack it, or it needs an encoder that cannot be loaded or is not named.
    """
    first = check_texts(dataset, column, f"--text {column}")
    if column in ARRAYS:
        if encoder is not None or tokens is not None:
            raise UserError(
                f"--text {column} has embeddings already: leave out --text-encoder and "
                f"--text-tokens"
            )
        return Texts(column, (first.shape[0], first.shape[1]))
    if encoder is None:
        raise UserError(
            f"--text {column} needs --text-encoder, a folder or a name on the hub such as "
            f"openai/clip-vit-large-patch14 or google/flan-t5-base"
        )
    opened = open_text_encoder(encoder, "--text-encoder", tokens or 0)
    return Texts(column, (opened.tokens, opened.width), opened)
