"""What is trained in a trial: tiny data, and settings with which a step takes a blink.

Every step is logged, a checkpoint is due every third step, and validation and previews come often,
so that a random moment finds something being written.
"""

import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from taming_dist.errors import UserError
from taming_dist.formats.code_shards import CodeShard, write_codes_manifest
from taming_dist.formats.manifest import IMAGES_FORMAT, Manifest
from taming_dist.formats.shards import write_shard

SAVED_EVERY = 3  # steps
GLOBAL_BATCH = 4
COMMON = [
    "+scale=laptop",
    f"data.global_batch={GLOBAL_BATCH}",
    "data.lanes=4",
    "data.block=4",
    "train.log_every=1",
    f"train.checkpoint_every={SAVED_EVERY}",
    "train.validate_every=5",
    "train.preview_every=10",
    "train.preview_images=2",
    "engine.persist_below=500",
    "log.wandb=disabled",
]
# The stages by what they train. A GAN from the second step on, whose weight does not depend on how
# a batch is cut, and codes that are restarted; what is drawn in stage 2 is random orders, noise in
# the codes, dropout and dropped classes.
SETTINGS = {
    "vqgan": [
        "+experiment=flickr",
        "model/quantizer=ema",
        "model.quantizer.codes=32",
        "model.quantizer.dim=8",
        "model.resolution=16",
        "model.multipliers=[1,1]",
        "data.size=16",
        "~loss/terms@loss.terms.perceptual",
        "loss.disc_start=4",
        "loss.adaptive=lagged",
        "loss.discriminator.channels=8",
        "optim.lr=1e-4",
        "optim.ema_half_life=20",
        "train.validate_images=4",
    ],
    "prior": [
        "+experiment=flickr_transformer",
        "data.vqgan=",
        "model.layers=2",
        "model.heads=2",
        "model.width=32",
        "model/condition=class",
        "model/order=rar",
        "model.scheme.pkeep=0.9",
        "model.dropout_residual=0.1",
        "loss.condition_dropout=0.2",
        "optim.lr=1e-3",
        "optim.ema_half_life=20",
    ],
}
# What is off where ranks change: each draws its own masks.
UNCUT = {
    "vqgan": [],
    "prior": [f"model.dropout_{kind}=0" for kind in ("embedding", "attention", "residual")],
}
SAMPLES, SHARD_SAMPLES, CLASSES = 48, 12, 3
CODES, GRID = 24, (3, 4)


def make_images(folder: Path, generator: np.random.Generator) -> None:
    """Blurred noise of 24 x 20 pixels, as image shards."""
    folder.mkdir(parents=True)
    shards = []
    for start in range(0, SAMPLES, SHARD_SAMPLES):
        samples = []
        for number in range(start, start + SHARD_SAMPLES):
            noise = Image.fromarray(generator.integers(0, 256, (5, 6, 3), dtype=np.uint8))
            file = io.BytesIO()
            noise.resize((24, 20), Image.Resampling.BILINEAR).save(file, "PNG")
            samples.append((f"{number:04d}", {"png": file.getvalue()}))
        shards.append(write_shard(folder / f"images-{start:06d}.tar", samples))
    Manifest(IMAGES_FORMAT, tuple(shards), None).save(folder)


def make_codes(folder: Path, generator: np.random.Generator) -> None:
    """Random codes of three classes, as code shards."""
    folder.mkdir(parents=True)
    names = []
    for start in range(0, SAMPLES, SHARD_SAMPLES):
        numbers = np.arange(start, start + SHARD_SAMPLES)
        facts = {
            "vocab": CODES,
            "tokenizer": {"fingerprint": "f" * 64},
            "source": {
                "fingerprint": "e" * 64,
                "range": [start, start + SHARD_SAMPLES],
                "bad": [],
            },
            "preprocessing": {"size": 16},
        }
        shape = (SHARD_SAMPLES, 1, *GRID)
        shard = CodeShard(
            facts,
            codes=generator.integers(0, CODES, shape, dtype=np.uint16),
            sources=numbers,
            keys=[f"{number:04d}" for number in numbers],
            classes=(numbers % CLASSES).astype(np.int32),
        )
        names.append(f"codes-{start:06d}.tar")
        shard.save(folder / names[-1])
    write_codes_manifest(folder, names, None)


MAKERS: dict[str, Callable[[Path, np.random.Generator], None]] = {
    "vqgan": make_images,
    "prior": make_codes,
}


def new_folder(out: Path) -> Path:
    """The absolute path of `--out`; `UserError` if something lies there."""
    if out.exists() and any(out.iterdir()):
        raise UserError(f"--out={out} is not empty: remove it, or name another folder")
    return out.resolve()


def arguments(stage: str, data: Path | str, steps: int, overrides: Sequence[str] = ()) -> list[str]:
    """The command line of a run, but for its folder, ranks and ZeRO stage."""
    given: Iterable[str] = (f"data.train={data}", f"data.val={data}", f"train.steps={steps}")
    return [*SETTINGS[stage], *COMMON, *given, *overrides]
