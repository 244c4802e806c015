"""From the keys of the command to an optimisation that is ready to begin."""

import dataclasses
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from taming_dist.errors import UserError
from taming_dist.formats.names import printable
from taming_dist.generation.placement import check_sides
from taming_dist.guiding.config import ClipConfig
from taming_dist.guiding.model import ImageTextModel
from taming_dist.guiding.objective import Objective
from taming_dist.guiding.optimise import Guidance, Optimisation, Settings
from taming_dist.guiding.prompts import Prompt, prompts_of
from taming_dist.guiding.variables import MOST_CODES, VARIABLES, Codebook
from taming_dist.guiding.views import Views
from taming_dist.models.modalities import RGB
from taming_dist.models.vqgan import VQGAN, check_all_coded
from taming_dist.sampling.given import cut, photograph, read_file
from taming_dist.sampling.recipe import Recipe, device_name, hash_of
from taming_dist.sampling.request import parse_size

FORMAT = "taming_dist.clip.v1"
PLACES = ("out",)  # keys that say nothing of the picture
FILES = ("image", "target")


@dataclasses.dataclass(frozen=True)
class Asked:
    """What the command asks for, checked as far as it can be before models are loaded."""

    texts: tuple[Prompt, ...]
    targets: tuple[Prompt, ...]
    size: tuple[int, int] | None

    @classmethod
    def of(cls, config: ClipConfig) -> "Asked":
        """Raises:
        UserError: nothing is asked for, or a key cannot be read.
        """
        texts, targets = prompts_of("text", config.text), prompts_of("target", config.target)
        if not texts and not targets:
            raise UserError('text=... is missing: give text="a red barn in the snow", or target=')
        if config.pull and not config.image:
            raise UserError(f"pull={config.pull}: toward what? give image=, or leave pull out")
        for picture in targets:
            _require_file("target", picture.content)
        if config.image:
            _require_file("image", config.image)
        return cls(texts, targets, parse_size(config.size))

    @property
    def weights(self) -> list[float]:
        """Those of the texts, and then of the pictures."""
        return [each.weight for each in (*self.texts, *self.targets)]

    def notes(self, model: ImageTextModel) -> list[str]:
        """What the user should know before it begins."""
        cut_off = [each.content for each in self.texts if model.is_cut(each.content)]
        return [f"note: text: {text!r} is longer than CLIP reads: it is cut" for text in cut_off]


def open_optimisation(
    config: ClipConfig, asked: Asked, vqgan: VQGAN, model: ImageTextModel
) -> Optimisation:
    """The optimisation of a command, on the models' device, before its first step.

    Raises:
        UserError: a size, picture or VQGAN that cannot serve.
    """
    check_vqgan(vqgan, config.vqgan)
    factor, own = vqgan.config.factor, vqgan.config.resolution
    shape = asked.size or (own, own)
    check_sides(shape, factor)
    device = vqgan.quant_conv.weight.device
    vqgan = vqgan.eval().requires_grad_(False)
    generator = torch.Generator(device).manual_seed(config.seed)
    codebook = Codebook.of(vqgan.quantize, device)
    if config.image:
        codes = codes_of(config.image, shape, vqgan)
    else:
        grid = shape[0] // factor, shape[1] // factor
        codes = torch.randint(vqgan.config.vocabulary, grid, generator=generator, device=device)
    views = Views(model.size, config.cuts, config.cut_smallest, config.cut_power, config.augment)
    names = [field.name for field in dataclasses.fields(Settings)]
    return Optimisation(
        vqgan,
        VARIABLES[config.optimise](codebook, codes),
        Guidance(model, views, Objective.of(embeddings_of(asked, model, device), asked.weights)),
        Settings(**{name: getattr(config, name) for name in names}),
        generator,
    )


def check_vqgan(vqgan: VQGAN, folder: str) -> None:
    """UserError unless the VQGAN makes photographs, of codes that can be listed."""
    if not isinstance(vqgan.config.modality, RGB):
        raise UserError(
            f"vqgan={folder} makes maps ({vqgan.config.modality.name}), which CLIP has not "
            f"learned: give the export of a VQGAN of photographs"
        )
    side = vqgan.config.resolution
    if len(shape := vqgan.config.code_shape(side, side)) != 2:
        raise UserError(
            f"vqgan={folder} has codes of the shape {list(shape)}, but what is optimised here is "
            f"one code at each place: give a VQGAN whose codes are a grid"
        )
    if vqgan.config.vocabulary > MOST_CODES:
        raise UserError(
            f"vqgan={folder} has {vqgan.config.vocabulary} codes, more than the {MOST_CODES} that "
            f"can be compared with one another here"
        )


@torch.no_grad()
def embeddings_of(asked: Asked, model: ImageTextModel, device: torch.device) -> Tensor:
    """The embeddings [m, e] of the texts, and then of the pictures."""
    found = []
    if asked.texts:
        tokens = model.tokenize([each.content for each in asked.texts])
        found.append(model.encode_text(tokens).float())
    shown = Guidance(model, Views(model.size, 1), Objective(torch.empty(0), torch.empty(0)))
    for picture in asked.targets:
        pixels = colours_of("target", picture.content, (model.size, model.size)).to(device)
        found.append(shown.embeddings(pixels))
    return torch.cat(found)


@torch.no_grad()
def codes_of(image: str, shape: tuple[int, int], vqgan: VQGAN) -> Tensor:
    """The codes [i, j] of a picture, of which the largest part in the centre with the proportions
    of a shape is taken.

    Raises:
        UserError: it cannot be read or encoded.
    """
    pixels = colours_of("image", image, shape).to(vqgan.quant_conv.weight.device)
    codes = vqgan.encode(2 * pixels - 1)
    check_all_coded(codes.cpu(), [f"image: {printable(image)}"], "give another picture")
    return codes[0]


def colours_of(key: str, file: str, shape: tuple[int, int]) -> Tensor:
    """The largest part in the centre of a picture, [1, 3, h, w] in [0, 1]."""
    pixels = cut(read_file(key, Path(file), photograph), shape, Image.Resampling.BICUBIC)
    return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))[None].float() / 255


def recipe_of(config: ClipConfig, asked: Asked, vqgan: str, model: ImageTextModel) -> Recipe:
    """What makes the picture; `vqgan`: the fingerprint of the export."""
    settings = dataclasses.asdict(config)
    given = {"image": config.image, "target": [each.content for each in asked.targets]}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return Recipe(
        settings={name: own for name, own in settings.items() if name not in PLACES},
        fingerprints={"vqgan": vqgan, "clip": model.fingerprint},
        inputs={name: hash_of(own) for name, own in given.items() if own},
        device=device_name(device),
        threads=torch.get_num_threads() if device.type == "cpu" else 0,
    )


def _require_file(key: str, file: str) -> None:
    if not Path(file).is_file():
        raise UserError(f"{key}: there is no file {printable(file)}")
