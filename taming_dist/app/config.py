"""The keys of `python -m taming_dist.demo`."""

from dataclasses import dataclass

from taming_dist.ranges import check_ranges, ranged

PORT = 7860  # Gradio's usual one


@dataclass
class DemoConfig:
    """The exports that the page works with: a `vqgan` for reconstruction, and a `transformer` on
    its codes for all else; `condition_vqgan` encodes the pictures that it is conditioned on, and
    `text_encoder` names the encoder of its prompts if that has moved; `classes` is a folder of
    shards, images or codes, whose manifest names the classes.

    The page is at http://`host`:`port` (0: any free port); whoever reaches it may use it. Uploads
    have at most `upload_mb` MiB, and the pictures that are asked for `most_pixels`. `precision` and
    `compile` are those of `python -m taming_dist.sample`.
    """

    vqgan: str = ""
    transformer: str = ""
    condition_vqgan: str = ""
    text_encoder: str = ""
    classes: str = ""
    host: str = "127.0.0.1"
    port: int = ranged(PORT, at_least=0, at_most=2**16 - 1)
    upload_mb: int = ranged(16, at_least=1, at_most=512)
    most_pixels: int = ranged(2**22, at_least=1)
    precision: str = "fp32"
    compile: bool = False

    def __post_init__(self) -> None:
        check_ranges(self)
