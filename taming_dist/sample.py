"""Entry point: write images that a trained transformer and its VQGAN make.

python -m taming_dist.sample transformer=EXPORT vqgan=EXPORT out=DIR n=64 seed=0 class_id=3

<out> gets 000000.png and so on, grid.png, and last samples.json with what made them.
Source: arXiv 2012.09841, section 4.
"""

import dataclasses
import math
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import MISSING
from torch import Tensor

from taming_dist.config import hydra_entry
from taming_dist.data.codes import CodeDataset
from taming_dist.engine.world import choose_device
from taming_dist.errors import UserError
from taming_dist.formats.files import writing
from taming_dist.formats.strict_json import read_json, write_json
from taming_dist.generation.generator import Generator, Samples
from taming_dist.generation.pictures import image_grid, to_uint8
from taming_dist.generation.sampling import Sampling
from taming_dist.models.prior.conditions import Columns, Condition, Request, TextCondition
from taming_dist.models.prior.transformer import Transformer
from taming_dist.models.vqgan import VQGAN
from taming_dist.ranges import LARGEST_SEED, check_ranges, ranged
from taming_dist.text_encoders import open_text_encoder
from taming_dist.training.sinks import save_png

GRID_COLUMNS = 10
GRID_IMAGES = 100
PROGRESS_PERIOD_S = 10.0
TERMINAL_PERIOD_S = 0.2
TEXTS_AT_ONCE = 64


@dataclass
class SampleConfig:
    """What to sample; `transformer` and `vqgan` are export folders, `out` receives the images.

    A class-conditional transformer takes `class_id` for every image, or else goes through its
    classes in turn. `condition` is code shards, a spec or a list of them, whose first n samples say
    what is asked for; a JSON file of layouts of objects; or, for several conditions, what each
    takes by its name (docs/conditions.md). `prompt` is a text or a list of them in turn, read by
    the text encoder of the codes, which `text_encoder` names if it has moved. `size` is
    HEIGHTxWIDTH in pixels (the trained one if left out); `batch` images are made at a time, which
    changes speed and memory, not the images.
    `top_k`, `top_p` off: null. `steps` and `choice_temperature`: how a transformer of
    model/scheme=masked writes an image (null: as it was trained to be previewed).
    """

    transformer: str = MISSING
    vqgan: str = MISSING
    out: str = MISSING
    n: int = ranged(64, at_least=1)
    seed: int = ranged(0, at_least=0, at_most=LARGEST_SEED)
    class_id: int | None = ranged(None, at_least=0)
    condition: Any = None
    prompt: Any = None
    text_encoder: str = ""
    size: str | None = None
    temperature: float = ranged(1.0, at_least=0)
    top_k: int | None = ranged(None, at_least=0)
    top_p: float | None = ranged(None, above=0, at_most=1)
    guidance: float = ranged(1.0, at_least=0)
    steps: int | None = ranged(None, at_least=1)
    choice_temperature: float | None = ranged(None, at_least=0)
    batch: int = ranged(16, at_least=1)

    def __post_init__(self) -> None:
        check_ranges(self)


def main(config: SampleConfig) -> None:
    """Sample, and write the images into `config.out`.

    Raises:
        UserError: exports, settings or a folder that cannot be used; nothing is written then.
    """
    names = [field.name for field in dataclasses.fields(Sampling)]
    sampling = Sampling(**{name: getattr(config, name) for name in names})
    generator = load_generator(config)
    generator.check_size(parse_size(config.size))
    condition = generator.transformer.condition
    request = Request(
        config.n,
        CodeDataset.open,
        read_json,
        config.class_id,
        config.condition,
        prompts_of(config.prompt, condition),
        lambda asked, texts: encode_texts(asked, texts, config.text_encoder),
    )
    columns = condition.requested(request)
    prefix = generator.prefix(config.n, columns or None)
    parts = generator.stream(prefix, sampling, config.seed, config.batch)
    out = Path(config.out)
    prepare_folder(out, config.n)
    with writing(out, "out="):
        pictures = write_pictures(with_progress(parts, config.n), out)
        per_row = images_per_row(config.n, condition.period(request))
        save_png(image_grid(pictures, per_row), out / "grid.png")
        write_record(config, generator, columns, out)
    print(f"{config.n} images, and all at a glance: {out / 'grid.png'}")


def prompts_of(prompt: Any, condition: Condition) -> tuple[str, ...]:
    """The texts of `prompt`.

    Raises:
        UserError: it is none, or the transformer is not conditioned on text.
    """
    if prompt is None:
        return ()
    texts = tuple(prompt) if isinstance(prompt, list | tuple) else (prompt,)
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise UserError(f"prompt: {prompt!r} is no text and no list of texts")
    if not any(isinstance(each, TextCondition) for each in condition.conditions):
        raise UserError("prompt: this transformer is not conditioned on text, leave it out")
    return texts


def encode_texts(condition: Condition, texts: Sequence[str], place: str) -> Tensor:
    """Embeddings [n, m, w] of texts by the encoder that the condition has learned; `place`: where
    it is now, if it has moved.

    Raises:
        UserError: it is not known, cannot be loaded, or is another.
    """
    assert isinstance(condition, TextCondition)
    if not condition.fingerprint:
        raise UserError(
            "prompt: this transformer learned embeddings that image shards had, of an encoder that "
            "is not known: give condition=SHARDS"
        )
    encoder = open_text_encoder(place or condition.encoder, "text_encoder", condition.tokens)
    if encoder.fingerprint != condition.fingerprint:
        raise UserError(
            f"text_encoder={encoder.name} has the fingerprint {encoder.fingerprint}, but this "
            f"transformer learned texts of {condition.fingerprint}: give that encoder"
        )
    distinct = list(dict.fromkeys(texts))
    parts = [distinct[at : at + TEXTS_AT_ONCE] for at in range(0, len(distinct), TEXTS_AT_ONCE)]
    found = torch.cat([encoder.encode(part) for part in parts])
    return found[[distinct.index(text) for text in texts]]


def load_generator(config: SampleConfig) -> Generator:
    """Return the generator of the two exports, on the GPU if there is one."""
    device = choose_device()
    transformer = Transformer.from_pretrained(config.transformer)
    vqgan = VQGAN.from_pretrained(config.vqgan)
    return Generator(transformer.to(device), vqgan.to(device))


def parse_size(text: str | None) -> tuple[int, int] | None:
    """Return (height, width) in pixels from "512x1024"."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None:
        raise UserError(f"size: {text!r} is no size, give HEIGHTxWIDTH such as 256x256")
    return int(match[1]), int(match[2])


def prepare_folder(out: Path, n: int) -> None:
    """Make `out` ready for n images: writable, and free of an earlier run's, which would be taken
    for this one's should it end early. A larger run's are not ours to remove, nor are pictures
    with other names than ours."""
    earlier = [picture for picture in out.glob("*.png") if is_ours(picture)]
    for picture in earlier:
        if int(picture.stem) >= n:
            raise UserError(
                f"out: {picture} is of an earlier, larger run; remove it or give another folder"
            )
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
        (out / "samples.json").unlink(missing_ok=True)  # first: it says that the folder is complete
        (out / "grid.png").unlink(missing_ok=True)
        for picture in earlier:
            picture.unlink()
    except OSError as error:
        raise UserError(f"out: cannot write to {out} ({error.strerror}), give another") from error


def is_ours(picture: Path) -> bool:
    """Whether a picture is named as those of a run are."""
    return picture.stem.isdecimal() and picture.name == picture_name(int(picture.stem))


def picture_name(index: int) -> str:
    """The file of a run's image."""
    return f"{index:06d}.png"


def write_pictures(parts: Iterator[Samples], out: Path) -> Tensor:
    """Write each image as <out>/<index>.png; return the first ones [b, 3, h, w] as uint8."""
    shown: list[Tensor] = []
    index = 0
    for part in parts:
        for picture in to_uint8(part.images).cpu():
            save_png(picture, out / picture_name(index))
            if index < GRID_IMAGES:
                shown.append(picture)
            index += 1
    return torch.stack(shown)


def with_progress(parts: Iterator[Samples], total: int) -> Iterator[Samples]:
    """Pass the parts on, and say on stderr now and then how many images are done, and how fast."""
    terminal = sys.stderr.isatty()
    period = TERMINAL_PERIOD_S if terminal else PROGRESS_PERIOD_S
    start = said = time.perf_counter()
    done = 0
    for part in parts:
        yield part
        done += len(part.images)
        now = time.perf_counter()
        if now - said >= period or done == total:
            said = now
            line = f"{done}/{total} images, {done / (now - start):.2f} images/s"
            end = "\r" if terminal and done < total else "\n"
            print(line, end=end, file=sys.stderr, flush=True)


def images_per_row(count: int, period: int) -> int:
    """Return how many images of `count` stand in a row: those of a period, if conditions repeat."""
    if 1 < period <= GRID_COLUMNS:
        return period
    return min(GRID_COLUMNS, math.ceil(math.sqrt(count)))


def write_record(config: SampleConfig, generator: Generator, columns: Columns, out: Path) -> None:
    """Write <out>/samples.json: settings, fingerprints, and the class of each image (or null)."""
    classes = columns.get("cls")
    ids = [None] * config.n if classes is None else classes.tolist()
    record: dict[str, Any] = {
        "settings": dataclasses.asdict(config),
        "fingerprints": {
            "transformer": generator.transformer.fingerprint,
            "vqgan": generator.vqgan.fingerprint,
        },
        "images": [
            {"file": picture_name(index), "class": class_id} for index, class_id in enumerate(ids)
        ],
    }
    write_json(out / "samples.json", record)


if __name__ == "__main__":
    hydra_entry("sample", SampleConfig, main)
