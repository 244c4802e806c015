"""The keys of `python -m taming_dist.evaluate`."""

from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING

from taming_dist.data.reader import MOST_THREADS
from taming_dist.losses.perceptual import NETS, WEIGHTS
from taming_dist.ranges import check_choice, check_ranges, ranged

BOTH = "both"
FEATURES = ("none", "inception", "random")


@dataclass
class EvaluateConfig:
    """What to measure; `model` is an export folder, `data` a shard spec or a list of them, `out`
    gets the results.

    `size`: pixels of the centre crops (the model's resolution if left out). `pictures`: images
    shown beside their reconstructions. `lpips_net`: vgg, alex, or both, the second of which is then
    another figure, lpips_alex. `lpips_weights`: pretrained, or random (tests only).
    `features`: none, or inception, for rFID, rKID and the like of a VQGAN of photographs (random:
    tests only). `max_bad_fraction`: more images that cannot be read end the evaluation.
    """

    model: str = MISSING
    data: Any = MISSING
    out: str = MISSING
    batch: int = ranged(16, at_least=1)
    size: int | None = ranged(None, at_least=1)
    pictures: int = ranged(24, at_least=0)
    lpips_net: str = "vgg"
    lpips_weights: str = "pretrained"
    features: str = "none"
    max_bad_fraction: float = ranged(0.001, at_least=0, at_most=1)
    threads: int = ranged(2, at_least=1, at_most=MOST_THREADS)

    def __post_init__(self) -> None:
        check_ranges(self)
        check_choice("lpips_net", self.lpips_net, (*NETS, BOTH))
        check_choice("lpips_weights", self.lpips_weights, WEIGHTS)
        check_choice("features", self.features, FEATURES)

    @property
    def lpips_nets(self) -> dict[str, str]:
        """The networks of LPIPS by the names of their metrics."""
        if self.lpips_net == BOTH:
            return {"lpips": "vgg", "lpips_alex": "alex"}
        return {"lpips": self.lpips_net}
