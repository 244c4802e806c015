"""The keys of `python -m taming_dist.clip`."""

from dataclasses import dataclass

from omegaconf import MISSING

from taming_dist.guiding.optimise import DTYPES
from taming_dist.guiding.variables import VARIABLES
from taming_dist.ranges import LARGEST_SEED, check_choice, check_ranges, ranged

MOST_STEPS = 10**6
MOST_CUTS = 4096


@dataclass
class ClipConfig:
    """What a picture of the VQGAN in the export folder `vqgan` is optimised toward, and `out`, the
    folder that gets it: `text`, one or several with weights, "a red barn | snow:0.5 | people:-0.3",
    and the pictures `target`, "photo.png:0.5". It begins as `image`, toward which `pull` draws it
    back, or with random codes, of a `size` HEIGHTxWIDTH in pixels (null: the VQGAN's own).

    `optimise`: latents, which are quantized in each step, or codes, a distribution for each place
    whose `temperature` sinks to `final_temperature`. `lr` is in standard deviations of the codebook
    or in nats, for a step. Each of `steps` looks at `cuts` cut-outs with sides from `cut_smallest`
    to 1 times the picture's short one (uniform to the `cut_power`), changed at random by `augment`
    (0: not at all). Each `every` steps the picture is written (0: at the end alone).

    `clip_model`: a name of open_clip's, with `clip_weights`, a file or a name of its list; or a
    folder that has both. `precision` of its image encoder: fp32, bf16 or fp16.
    """

    vqgan: str = MISSING
    out: str = MISSING
    text: str = ""
    target: str = ""
    image: str = ""
    pull: float = ranged(0.0, at_least=0)
    size: str | None = None
    optimise: str = "latents"
    steps: int = ranged(300, at_least=1, at_most=MOST_STEPS)
    every: int = ranged(50, at_least=0)
    seed: int = ranged(0, at_least=0, at_most=LARGEST_SEED)
    lr: float = ranged(0.1, above=0)
    temperature: float = ranged(1.0, above=0)
    final_temperature: float = ranged(0.1, above=0)
    cuts: int = ranged(32, at_least=1, at_most=MOST_CUTS)
    cut_smallest: float = ranged(0.3, above=0, at_most=1)
    cut_power: float = ranged(1.0, above=0)
    augment: float = ranged(1.0, at_least=0, at_most=1)
    clip_model: str = "ViT-B-32"
    clip_weights: str = ""
    precision: str = "fp32"

    def __post_init__(self) -> None:
        check_ranges(self)
        check_choice("optimise", self.optimise, VARIABLES)
        check_choice("precision", self.precision, DTYPES)
