"""The keys of `python -m taming_dist.sample`."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from taming_dist.generation.decoding import DecodingKeys
from taming_dist.generation.rejection import LEAST_ACCEPTANCE
from taming_dist.ranges import check_choice, ranged
from taming_dist.sampling.writers import WRITERS
from taming_dist.training.wandb_sink import LogConfig

FILES = (
    "condition",
    "image",
    "mask",
    "classifier_weights",
)  # the keys that name files which decide the pictures
MOST_IMAGES = 10**7  # of one run, whose names and units every rank has in memory


@dataclass
class SampleConfig(DecodingKeys):
    """What to sample; `transformer` and `vqgan` are export folders, `out` receives the images in
    one of the formats of `taming_dist.sampling.writers`. `from_`, typed from=, is samples.json of a
    run or one of its pictures: that is made again, and all else is as it was.

    A class-conditional transformer takes `class_id` for every image, or else goes through its
    classes in turn. `condition` is code shards, a spec or a list of them, whose first n samples say
    what is asked for; a JSON file of layouts of objects; pictures (files or a folder), which the
    export `condition_vqgan` encodes; or, for several conditions, what each takes by its name
    (docs/conditions.md). `n` null: as many as there are pictures, or else 64. `prompt` is a text or
    a list of them in turn, read by the text encoder of the codes, which `text_encoder` names if it
    has moved. `size` is HEIGHTxWIDTH in pixels (the trained one if left out); `batch` images are
    made at a time, which changes speed and memory, not the images. Larger sizes are written
    through a window, which moves by `window_step` codes (1: as in the paper); `batch` is then
    windows at a time, and `window_memory` GiB for what windows keep. They are decoded `tile` rows
    of pixels at a time (null: all while that takes little memory; 0: all).

    `image`, a picture or a folder of them, is completed: `keep` of it stays (upper, lower, left,
    right, or a share of the rows from the top), or what is black in `mask`, or its first
    `keep_codes` codes. Of 1 / `acceptance` candidates for an image the best one stays, by its
    likelihood, or by the probability of its class that `classifier` sees, a ResNet of torchvision,
    such as resnet101, with its own weights or those of the file `classifier_weights`
    (docs/sampling.md).

    `top_k`, `top_p` off: null. `guidance_schedule` (constant, linear or cosine) leads from 1 to
    `guidance` over an image's codes. `precision`: fp32 or bf16. `compile` has torch.compile make
    fewer kernels of a token's step, which takes a minute or more at first. `steps` and
    `choice_temperature`: how a transformer of model/scheme=masked writes an image (null: as it was
    trained to be previewed). `log`: as in training, but that W&B is told of a finished run only
    where `log.wandb` asks for it.
    """

    transformer: str = ""
    vqgan: str = ""
    out: str = MISSING
    from_: str = ""
    format: str = "png"
    n: int | None = ranged(None, at_least=1, at_most=MOST_IMAGES)
    condition_vqgan: str = ""
    image: Any = None
    keep: Any = None
    mask: Any = None
    keep_codes: int | None = ranged(None, at_least=1)
    acceptance: float = ranged(1.0, at_least=LEAST_ACCEPTANCE, at_most=1)
    classifier: str = ""
    classifier_weights: str = ""
    prompt: Any = None
    text_encoder: str = ""
    size: str | None = None
    batch: int = ranged(16, at_least=1)
    window_step: int = ranged(1, at_least=1)
    window_memory: float = ranged(2.0, at_least=0)
    tile: int | None = ranged(None, at_least=0)
    compile: bool = False
    log: LogConfig = field(default_factory=lambda: LogConfig(wandb="disabled"))

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("format", self.format, WRITERS)
