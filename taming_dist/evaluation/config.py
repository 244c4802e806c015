"""The keys of `python -m taming_dist.evaluate`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import MISSING

from taming_dist.data.reader import MOST_THREADS
from taming_dist.errors import UserError
from taming_dist.generation.decoding import DecodingKeys
from taming_dist.losses.perceptual import NETS, WEIGHTS
from taming_dist.ranges import check_choice, ranged

BOTH = "both"
MOST_SAMPLES = 10**7
FEATURES = ("none", "inception", "random")


@dataclass
class EvaluateConfig(DecodingKeys):
    """What to measure, and `out`, which gets the results: the export folder `model` on `data`, a
    shard spec or a list of them; or `images`, a folder of pictures, an npz file or shards, against
    a `reference`, which is such a set or an npz file of its statistics. `n`: as many samples of a
    transformer with the decoder of the export `vqgan` are measured like given images; `condition`,
    `class_id`, `seed` and the settings of decoding are those of `python -m taming_dist.sample`,
    whose images these are.

    `probe`: a transformer of `probe_layers` blocks of `probe_width` is trained on `probe_images`
    images of the code shards `train`, and measured on those of `data` and by `n` samples, which
    tells how good the codes of their tokenizer are to generate with.

    `size`: pixels of the centre crops (if left out the model's resolution; of given images their
    own size). `pictures`: images shown beside their reconstructions. `training`, a set of images as
    above, is searched for the `neighbours` that look most like each of the first `examined` samples
    or given images. `lpips_net`: vgg, alex, or both, the second of which is then
    another figure, lpips_alex. `lpips_weights`: pretrained, or random (tests only).
    `features`: none, or inception, for FID, KID and the like (random: tests only); null: inception
    for sets of images, and none for reconstructions, which have rFID with it. `max_bad_fraction`:
    more images that cannot be read end the evaluation.
    """

    model: str = ""
    data: Any = None
    probe: bool = False
    probe_layers: int = ranged(8, at_least=1)
    probe_width: int = ranged(512, at_least=1)
    probe_images: int = ranged(256_000, at_least=1)
    train: Any = None
    images: Any = None
    reference: Any = None
    out: str = MISSING
    batch: int = ranged(16, at_least=1)
    size: int | None = ranged(None, at_least=1)
    pictures: int = ranged(24, at_least=0)
    lpips_net: str = "vgg"
    lpips_weights: str = "pretrained"
    features: str | None = None
    vqgan: str = ""
    n: int | None = ranged(None, at_least=1, at_most=MOST_SAMPLES)
    training: Any = None
    examined: int = ranged(16, at_least=1)
    neighbours: int = ranged(4, at_least=1)
    max_bad_fraction: float = ranged(0.001, at_least=0, at_most=1)
    threads: int = ranged(2, at_least=1, at_most=MOST_THREADS)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("lpips_net", self.lpips_net, (*NETS, BOTH))
        check_choice("lpips_weights", self.lpips_weights, WEIGHTS)
        if self.features is not None:
            check_choice("features", self.features, FEATURES)

    @property
    def lpips_nets(self) -> dict[str, str]:
        """The networks of LPIPS by the names of their metrics."""
        if self.lpips_net == BOTH:
            return {"lpips": "vgg", "lpips_alex": "alex"}
        return {"lpips": self.lpips_net}


def given(config: EvaluateConfig) -> list[str]:
    """The keys that have another value than if they had been left out."""
    plain = EvaluateConfig(out=config.out)
    return [name for name, value in vars(config).items() if value != getattr(plain, name)]


def refuse(config: EvaluateConfig, keys: Sequence[str], why: str) -> None:
    """Raise a `UserError` for the first of `keys` that is given."""
    for key in keys:
        if getattr(config, key):
            raise UserError(f"{key}: {why}")
