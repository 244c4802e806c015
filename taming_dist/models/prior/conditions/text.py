"""A text, as the embedding that a frozen text encoder gives it.

Legend: b batch, m vectors of a text, w numbers in each, c width of the transformer.
"""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from taming_dist.errors import UserError
from taming_dist.models.initial import draw_normal
from taming_dist.models.prior.conditions.interface import (
    Codes,
    Columns,
    Condition,
    Request,
    agreed,
)
from taming_dist.ranges import check_ranges, marked, ranged

INIT_STD = 0.02


class TextProjection(nn.Module):
    """Embeddings of texts [b, m, w] as positions of a prefix [b, m, c]; behind the end of a text,
    where its vectors are zero, stands one that is learned.

    Source: arXiv 2406.06525, section 3.2 ("an additional MLP" on the text's features); two layers
    without biases and a GELU between them, as in its implementation.
    """

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(features, width, bias=False)
        self.fc2 = nn.Linear(width, width, bias=False)
        self.end = nn.Parameter(torch.empty(width))
        draw_normal(self.end, 0.0, INIT_STD)

    def forward(self, texts: Float[Tensor, "b m w"]) -> Float[Tensor, "b m c"]:
        hidden = F.gelu(self.fc1(texts.to(self.fc1.weight.dtype)), approximate="tanh")
        projected = self.fc2(hidden)
        behind = (texts == 0).all(-1, keepdim=True)
        return torch.where(behind, self.end.to(projected.dtype), projected)


@dataclass
class TextCondition(Condition):
    """The vectors of a text, one position each, through a projection that is learned.

    `tokens` vectors of `width` numbers, from the text encoder with this `fingerprint`; left out,
    they are as the code shards say. `encoder` is where tokenization found it, which sampling from a
    prompt loads unless it is given another place.
    """

    tokens: int = ranged(0, at_least=0)
    width: int = ranged(0, at_least=0)
    fingerprint: str = marked("", compared=False)
    encoder: str = marked("", compared=False, may_change=True)
    name: str = "text"
    columns: ClassVar[tuple[str, ...]] = ("txt",)
    features: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_ranges(self, "model.condition")

    @property
    def length(self) -> int:
        return self.tokens

    @property
    def vocabulary(self) -> int:
        return 0

    def embedding(self, width: int) -> nn.Module:
        return TextProjection(self.width, width)

    def blank(self) -> Float[Tensor, "1 m w"]:
        return torch.empty(1, self.tokens, self.width, device="meta")

    def part(self, count: int, columns: Columns) -> Float[Tensor, "{count} m w"]:
        """Return embeddings [b, m, w] in their stored precision."""
        given = columns.get("txt")
        if given is None:
            raise UserError(
                "condition: this transformer is conditioned on text: give prompt=... or code "
                "shards with texts (tools/tokenize_dataset.py --text)"
            )
        if given.shape != (count, self.tokens, self.width):
            raise UserError(
                f"condition: {count} images need embeddings of texts of the shape "
                f"{[count, self.tokens, self.width]}, not {list(given.shape)}"
            )
        return given

    def check(self) -> None:
        if self.tokens < 1 or self.width < 1:
            raise UserError(
                f"model.condition.tokens={self.tokens} and model.condition.width={self.width} "
                f"describe no texts: leave them out, they are those of the code shards"
            )

    def fitted(self, codes: Codes, spec: Any) -> "TextCondition":
        found = codes.text
        if found is None:
            raise UserError(
                f"model/condition=text, but {spec} has no texts: write them with "
                f"tools/tokenize_dataset.py --text COLUMN into another folder"
            )
        facts = {name: found[name] for name in ("tokens", "width", "fingerprint")}
        same = agreed(self, facts, "model.condition", spec)
        return replace(same, encoder=self.encoder or found.get("encoder", ""))

    def requested(self, request: Request) -> Columns:
        """The prompts in turn, or else the texts of code shards."""
        if not request.prompts:
            return super().requested(request)
        if request.condition is not None:
            raise UserError("prompt: condition=... has texts already, give one of the two")
        assert request.encode_texts is not None, "who takes prompts can encode them"
        texts = [request.prompts[k % len(request.prompts)] for k in request.images]
        return {"txt": request.encode_texts(self, texts)}

    def period(self, request: Request) -> int:
        return len(request.prompts) or 1
