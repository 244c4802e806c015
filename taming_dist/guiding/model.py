"""What is needed of a CLIP: any network that puts pictures and texts into one space will do.

Legend: n pictures, m texts, t tokens, e numbers of an embedding, s pixels.
"""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class ImageTextModel(Protocol):
    """A frozen pair of encoders on a device.

    `size`: pixels of a side of its square pictures, which it wants shifted by `mean` and divided by
    `std`, of each channel in [0, 1]; `fingerprint` tells its weights.
    """

    size: int
    mean: Sequence[float]
    std: Sequence[float]
    fingerprint: str

    def encode_image(self, pictures: Tensor) -> Tensor:
        """Pictures [n, 3, s, s], normalised as above -> embeddings [n, e] of any length."""

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Tokens [m, t] -> embeddings [m, e] of any length."""

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """Texts -> tokens int64 [m, t], on its device; what is too long is cut off."""

    def is_cut(self, text: str) -> bool:
        """Whether `tokenize` cuts a text off."""
