"""The settings of decoding, and the keys by which commands that make images have them.

Source: arXiv 2012.09841, section 4 (top-k sampling); top-p is nucleus sampling, arXiv 1904.09751,
section 3.1; guidance: arXiv 2207.12598.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any, TypeVar

from taming_dist.generation.guidance import SCHEDULES
from taming_dist.generation.precision import PRECISIONS
from taming_dist.ranges import LARGEST_SEED, check_choice, check_ranges, ranged

LARGEST_SCALE = 10**6  # of guidance and noise, so that logits stay finite in fp32

DecodingT = TypeVar("DecodingT", bound="Decoding")


@dataclass
class Decoding:
    """Temperature (0: always the likeliest code), top-k, top-p, guidance.

    `top_k` None or 0 and `top_p` None are off; each works without the other; top-p counts the
    probability that top-k has left. Codes as likely as the last one kept stay, too. `guidance` 1 is
    off; `guidance_schedule`, one of `guidance.SCHEDULES`, leads there from 1 over the image's
    codes, the cosine with `guidance_power`. `steps` and `choice_temperature` are those of the
    masked scheme (`models.prior.schemes.masked`), None: the model's own.

    Raises:
        UserError: a value outside its range.
    """

    temperature: float = ranged(1.0, at_least=0)
    top_k: int | None = ranged(None, at_least=0)
    top_p: float | None = ranged(None, above=0, at_most=1)
    guidance: float = ranged(1.0, at_least=0, at_most=LARGEST_SCALE)
    guidance_schedule: str = "constant"
    guidance_power: float = ranged(1.0, above=0)
    steps: int | None = ranged(None, at_least=1)
    choice_temperature: float | None = ranged(None, at_least=0, at_most=LARGEST_SCALE)

    def __post_init__(self) -> None:
        check_ranges(self)
        check_choice("guidance_schedule", self.guidance_schedule, SCHEDULES)

    @classmethod
    def of(cls: "type[DecodingT]", other: "Decoding") -> "DecodingT":
        """What a class with more keys has of this one's."""
        return cls(**{field.name: getattr(other, field.name) for field in dataclasses.fields(cls)})


@dataclass
class DecodingKeys(Decoding):
    """The keys of any command that makes images: the settings, `seed`, what the images are
    conditioned on (`class_id`, `condition`), and `precision`, fp32 or bf16."""

    seed: int = ranged(0, at_least=0, at_most=LARGEST_SEED)
    class_id: int | None = ranged(None, at_least=0)
    condition: Any = None
    precision: str = "fp32"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("precision", self.precision, PRECISIONS)
