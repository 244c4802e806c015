"""What the user of the sampling command asks for: sizes, texts, and what the condition reads."""

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from taming_dist.data.codes import CodeDataset
from taming_dist.errors import UserError
from taming_dist.formats.manifest import specs_of
from taming_dist.formats.strict_json import read_json
from taming_dist.models.prior.conditions import Condition, Request, TextCondition
from taming_dist.sampling.condition_pictures import without_pictures
from taming_dist.sampling.config import SampleConfig
from taming_dist.sampling.given import Given
from taming_dist.text_encoders import TextEncoder, open_text_encoder

TEXTS_AT_ONCE = 64


IMAGES = 64  # where nothing says how many


def request_of(
    config: SampleConfig, condition: Condition, count: int, pictures: Given | None = None
) -> Request:
    """What the `count` images of a command are conditioned on; `Request.of` gives that of some of
    them. `pictures`: those that the condition names, in turn.

    Code shards, files and text encoders are opened once, when they are first asked for.
    """
    prompts = prompts_of(config.prompt, condition)
    opened = lru_cache(maxsize=None)(CodeDataset.open)
    return Request(
        count,
        lambda spec: opened(spec if isinstance(spec, str) else tuple(specs_of(spec))),
        lru_cache(maxsize=None)(read_json),
        config.class_id,
        config.condition if pictures is None else without_pictures(config.condition),
        prompts,
        PromptEncoder(prompts, config.text_encoder),
        encode_pictures=None if pictures is None else pictures.codes,
    )


def prompts_of(prompt: Any, condition: Condition) -> tuple[str, ...]:
    """The texts of `prompt`.

    Raises:
        UserError: it is none, or the transformer is not conditioned on text.
    """
    if prompt is None:
        return ()
    texts = tuple(prompt) if isinstance(prompt, list | tuple) else (prompt,)
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise UserError(f"prompt: {prompt!r} is no text and no list of texts")
    if not any(isinstance(each, TextCondition) for each in condition.conditions):
        raise UserError("prompt: this transformer is not conditioned on text, leave it out")
    return texts


class PromptEncoder:
    """The embeddings of `prompts`, all encoded at once when the first are needed. `place`: where
    the encoder that the condition has learned is now, if it has moved."""

    def __init__(self, prompts: Sequence[str], place: str) -> None:
        self.prompts, self.place = list(dict.fromkeys(prompts)), place
        self._embeddings: Tensor | None = None

    def __call__(self, condition: Condition, texts: Sequence[str]) -> Tensor:
        """Return the embeddings [n, m, w] of some of the prompts.

        Raises:
            UserError: the encoder is not known, cannot be loaded, or is another.
        """
        if self._embeddings is None:
            encoder = self._encoder(condition)
            starts = range(0, len(self.prompts), TEXTS_AT_ONCE)
            parts = [encoder.encode(self.prompts[at : at + TEXTS_AT_ONCE]) for at in starts]
            self._embeddings = torch.cat(parts)
        return self._embeddings[[self.prompts.index(text) for text in texts]]

    def _encoder(self, condition: Condition) -> TextEncoder:
        assert isinstance(condition, TextCondition)
        if not condition.fingerprint:
            raise UserError(
                "prompt: this transformer learned embeddings that image shards had, of an encoder "
                "that is not known: give condition=SHARDS"
            )
        encoder = open_text_encoder(
            self.place or condition.encoder, "text_encoder", condition.tokens
        )
        if encoder.fingerprint != condition.fingerprint:
            raise UserError(
                f"text_encoder={encoder.name} has the fingerprint {encoder.fingerprint}, but this "
                f"transformer learned texts of {condition.fingerprint}: give that encoder"
            )
        return encoder


def parse_size(text: str | None) -> tuple[int, int] | None:
    """Return (height, width) in pixels from "512x1024", or from "256" of a square."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if match is None:
        raise UserError(f"size: {text!r} is no size, give HEIGHTxWIDTH such as 256x512, or a side")
    return int(match[1]), int(match[2] or match[1])
