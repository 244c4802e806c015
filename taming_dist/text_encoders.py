"""Frozen text encoders: what turns texts into the vectors that a prior is conditioned on.

They come from the package transformers (pip install 'taming-dist[text]'): the text part of CLIP,
the encoder of T5, or a sentence encoder, from a folder or the Hugging Face hub.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from taming_dist.errors import UserError
from taming_dist.pretrained import torchvision_models

# Source: arXiv 2406.06525, section 3.2: texts of up to 120 tokens
MOST_TOKENS = 120
LARGEST_HALF = torch.finfo(torch.float16).max
CLIP = ("clip", "clip_text_model")
EXTRA = "pip install 'taming-dist[text]'"


class TextEncoder(Protocol):
    """What encodes texts: `tokens` vectors of `width` numbers each; `fingerprint` tells it."""

    name: str
    tokens: int
    width: int
    fingerprint: str

    def to(self, device: torch.device) -> Any:
        """Move it there."""

    def encode(self, texts: Sequence[str]) -> Tensor:
        """Embeddings float16 [b, tokens, width], on its device; behind the end of a text they are
        zero, and what is longer is cut off."""


class TransformersEncoder:
    """The last hidden state of a text model of the package transformers."""

    def __init__(self, name: str, tokenizer: Any, model: Any, tokens: int) -> None:
        self.name, self.tokens = name, tokens
        self._tokenizer, self._model = tokenizer, model.eval().requires_grad_(False)
        self._tokenizer.padding_side = "right"
        if self._tokenizer.pad_token is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        self.width = int(model.config.hidden_size)
        self.fingerprint = fingerprint_of(tokenizer.get_vocab(), model.state_dict())

    def to(self, device: torch.device) -> "TransformersEncoder":
        self._model.to(device)
        return self

    @torch.no_grad()
    def encode(self, texts: Sequence[str]) -> Tensor:
        read = self._tokenizer(
            list(texts),
            padding="max_length",
            truncation=True,
            max_length=self.tokens,
            return_tensors="pt",
        )
        ids, mask = (read[name].to(self._model.device) for name in ("input_ids", "attention_mask"))
        found = self._model(input_ids=ids, attention_mask=mask).last_hidden_state
        found = found.float().clamp(-LARGEST_HALF, LARGEST_HALF) * mask[..., None]
        return found.to(torch.float16)


def fingerprint_of(vocabulary: dict[str, int], state: dict[str, Tensor]) -> str:
    """sha256 (hex) over the vocabulary and every tensor by name, whatever the package's version."""
    digest = hashlib.sha256(json.dumps(sorted(vocabulary.items())).encode())
    for name, tensor in sorted(state.items()):
        flat = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {flat.dtype} {tuple(flat.shape)}".encode())
        digest.update(flat.flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def open_text_encoder(name: str, key: str, tokens: int = 0) -> TransformersEncoder:
    """The text encoder in a folder or on the hub, for texts of `tokens` tokens (0: as many as it
    takes, at most MOST_TOKENS).

    Raises:
        UserError: it cannot be loaded, or takes fewer tokens; names `key`.
    """
    try:
        torchvision_models("texts")  # which transformers imports too, where it is there
        import transformers
    except ImportError as error:
        raise UserError(f"{key}={name} needs the package transformers: {EXTRA}") from error
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        config = transformers.AutoConfig.from_pretrained(name)
        kind: Any = transformers.AutoModelForTextEncoding
        if config.model_type in CLIP:
            kind = transformers.CLIPTextModel
        tokenizer = transformers.AutoTokenizer.from_pretrained(name)
        model = kind.from_pretrained(name, use_safetensors=True, dtype=torch.float32)
    except (OSError, ValueError, KeyError, ImportError) as error:
        why = str(error).strip().partition("\n")[0]
        raise UserError(
            f"{key}={name} cannot be loaded as a text encoder ({why}): give a folder or a name on "
            f"the hub of a CLIP, T5 or sentence encoder"
        ) from error
    limits = (tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None))
    limit = min(limit for limit in limits if limit)
    if tokens > limit:
        raise UserError(f"{key}={name} takes {limit} tokens of a text, fewer than {tokens}")
    return TransformersEncoder(name, tokenizer, model, tokens or min(limit, MOST_TOKENS))
