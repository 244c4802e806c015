"""Pictures for the page: as the sampling command makes them, and as they look while they appear."""

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from taming_dist.app.jobs import Halted, Job
from taming_dist.app.models import Models
from taming_dist.errors import UserError
from taming_dist.formats.files import writing
from taming_dist.formats.npy import to_npy
from taming_dist.formats.png import save_png
from taming_dist.generation.completion import Known, first_codes, masked_picture
from taming_dist.generation.generator import Generator
from taming_dist.generation.pictures import to_uint8
from taming_dist.generation.tiles import decode_pictures, tile_rows
from taming_dist.models.modalities import palette
from taming_dist.models.prior.orders import arrange, grid_of
from taming_dist.sampling.condition_pictures import CODES
from taming_dist.sampling.config import SampleConfig
from taming_dist.sampling.given import Given, read_file
from taming_dist.sampling.keeping import places_of
from taming_dist.sampling.plan import Plan, plan_of
from taming_dist.sampling.recipe import recipe_of
from taming_dist.sampling.thumbnails import reduced
from taming_dist.sampling.units import units_of
from taming_dist.sampling.writers.png import encoded

LOOK_S = 0.2  # between looks at a picture that is not written row by row, at least
SHARE = 2  # looking takes at most 1 / (1 + SHARE) of the time


@dataclass(frozen=True)
class Story:
    """How a picture came about: its codes [*shape], which of them were known at first, and what
    came after: one code after the other, the k-th place at places[k]; or, of the masked scheme,
    `steps`."""

    codes: Tensor
    start: Tensor
    places: Tensor
    steps: tuple[Known, ...] = ()

    def __len__(self) -> int:
        """How many steps there were."""
        return len(self.steps) or int((~self.start).sum())

    def after(self, step: int) -> Known:
        """What was known of the picture after so many steps."""
        if self.steps:
            return self.steps[step - 1] if step else self._known(self.start)
        order = arrange(~self.start[None], self.places)[0].cumsum(0)
        count = int((order <= step).sum()) if step < len(self) else self.start.numel()
        return self._known(self.start | first_codes(count, self.codes.shape, self.places))

    def _known(self, mask: Tensor) -> Known:
        return Known(self.codes[None], mask)


@dataclass(frozen=True)
class Made:
    """A finished picture: its PNG file with the recipe, its story, and `notes` for the user."""

    file: Path
    story: Story
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Progress:
    """How far a picture has got: codes that are known, of how many, and how it looks, uint8
    [3, h, w]; None: not worth the time."""

    known: int
    codes: int
    look: Tensor | None = None
    stopped: bool = False


def shown(generator: Generator, known: Known) -> Tensor:
    """A picture of which something is known, uint8 [3, h, w] on the CPU: flat where nothing is; of
    a sequence of scales, what the first ones make."""
    mask = known.mask.to(known.codes.device)
    scales = known.codes.ndim == 2 and bool(mask.any())
    codes = known.codes[:, : int(mask.sum())] if scales else known.codes.masked_fill(~mask, 0)
    picture = generator.pictures(codes)[0].float().cpu()
    return reduced(to_uint8(picture if scales else masked_picture(picture, known.mask[0].cpu())))


class Watching:
    """Looks at a picture in the making, when a row of its codes is finished or when there is time,
    and has the job halt between any two codes."""

    def __init__(self, plan: Plan, job: Job[Any]) -> None:
        self.plan, self.job = plan, job
        self.steps: list[Known] = []
        self._last: Callable[[], Known] | None = None
        scheme, config = plan.generator.transformer.scheme, plan.generator.transformer.config
        self._keeps = not scheme.causal
        # of the device nothing is asked for between rows, so that it is not waited for
        self._every = (
            config.code_grid[1] * config.levels if scheme.causal and plan.large is None else 1
        )
        self._calls, self._next = 0, 0.0
        self._looks = not tile_rows(plan.generator.vqgan, plan.size)

    def __call__(self, see: Callable[[], Known]) -> None:
        self.job.go_on()
        self._last = see
        self._calls += 1
        if self._keeps:
            self.steps.append(_on_cpu(see()))
        if self._calls % self._every == 0 and time.monotonic() >= self._next:
            self._look(see())

    def _look(self, known: Known, stopped: bool = False) -> None:
        began = time.monotonic()
        look = shown(self.plan.generator, known) if self._looks else None
        count, all_codes = int(known.mask[0].sum()), known.mask[0].numel()
        self.job.tell(Progress(count, all_codes, look, stopped))
        took = time.monotonic() - began
        pause = LOOK_S if self._every == 1 and not self._keeps else 0.0
        self._next = time.monotonic() + max(pause, SHARE * took)

    def halted(self) -> None:
        """Tell how far the picture has got when it was stopped."""
        if self._last is None:
            self.job.tell(Progress(0, 0, None, stopped=True))
        else:
            self._look(self._last(), stopped=True)

    def story(self) -> Story:
        """How the finished picture came about."""
        assert self._last is not None, "every picture has at least one step"
        codes = _on_cpu(self._last()).codes[0]
        given = self.plan.known(range(1))
        start = torch.zeros_like(codes) > 0 if given is None else given.mask[0].cpu()
        places = places_of(self.plan.generator, grid_of(codes.shape))
        return Story(codes, start, places, tuple(self.steps))


def _on_cpu(known: Known) -> Known:
    return Known(known.codes.cpu(), known.mask.cpu())


def check_size(models: Models, size: tuple[int, int] | None) -> None:
    """Raise a UserError for a picture of more pixels than the page makes."""
    most = models.config.most_pixels
    if size is not None and size[0] * size[1] > most:
        raise UserError(
            f"size: {size[0]}x{size[1]} are {size[0] * size[1]} pixels, and this page makes "
            f"pictures of at most {most}: ask for fewer, or start it with most_pixels=..."
        )


def asked(
    models: Models,
    settings: dict[str, Any],
    condition: Path | None = None,
    size: tuple[int, int] | None = None,
) -> SampleConfig:
    """The command of the sampling command that makes one picture with these settings, whose
    condition is a picture, perhaps, of a size that the page makes.

    Raises:
        UserError: a setting outside of its range.
    """
    check_size(models, size)
    own, given = models.config, models.wants
    learned = None if models.generator is None else models.generator.size
    return SampleConfig(
        out="",
        n=1,
        transformer=own.transformer,
        vqgan=own.vqgan,
        condition_vqgan=own.condition_vqgan if condition else "",
        text_encoder=own.text_encoder,
        condition={CODES: str(condition)} if condition and given.several else _text(condition),
        size=None if size in (None, learned) else f"{size[0]}x{size[1]}",
        precision=own.precision,
        compile=own.compile,
        **settings,
    )


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def make(models: Models, config: SampleConfig, folder: Path, job: Job[Progress | Made]) -> None:
    """Make the picture of a command in a folder, and tell how it gets on, and last the picture.

    Raises:
        UserError: settings that the models cannot serve.
    """
    assert models.generator is not None
    plan = plan_of(config, models.generator, models.wants.encoder)
    recipe = recipe_of(config, plan)
    watching = Watching(plan, job)
    unit = units_of(1, plan.batch, folder, range(1))[0]
    try:
        with writing(folder):
            (picture,) = plan.pictures(unit, watching)
            job.go_on()
            file = folder / "picture.png"
            file.write_bytes(encoded(picture, recipe.text(0)))
    except Halted:
        watching.halted()
        return
    job.tell(Made(file, watching.story(), plan.notes))


@dataclass(frozen=True)
class Reconstructed:
    """A picture as the VQGAN sees it and as its codes show it, uint8 [3, h, w] each, the codes
    [*shape], and the files of the latter two."""

    seen: Tensor
    picture: Tensor
    codes: Tensor
    files: list[Path]

    @property
    def used(self) -> int:
        """How many different codes there are."""
        return len(self.codes.unique())


@torch.no_grad()
def reconstruct(models: Models, path: Path, folder: Path) -> Reconstructed:
    """Encode a picture, and decode its codes.

    Raises:
        UserError: it cannot be read as one of the VQGAN's kind.
    """
    vqgan = models.vqgan
    given = Given("picture", (path,), vqgan, (1, 1), (1, 1))
    height, width = read_file("picture", path, given.reader).shape[:2]
    shape = models.whole(height, width)
    given = dataclasses.replace(given, shape=shape, scaled=shape)
    codes = given.codes([0])
    picture = to_uint8(decode_pictures(vqgan, codes.to(models.device)))[0].cpu()
    files = [folder / "reconstruction.png", folder / "codes.npy"]
    with writing(folder):
        save_png(picture, files[0])
        files[1].write_bytes(to_npy(codes[0].numpy()))
    return Reconstructed(to_uint8(given.picture(0)), picture, codes[0], files)


def code_picture(codes: Tensor, vocabulary: int, times: int) -> np.ndarray:
    """Codes [i, j] as a picture, uint8 [i * times, j * times, 3]: each code has a colour. Levels
    [levels, i, j] lie side by side, and a sequence [n] is a row."""
    beside = torch.atleast_2d(codes) if codes.ndim < 3 else torch.cat(list(codes), dim=1)
    found = to_uint8(palette(vocabulary))[beside].numpy()
    return found.repeat(times, axis=0).repeat(times, axis=1)


def given_picture(models: Models, path: Path) -> Tensor:
    """The part of a picture, uint8 [3, h, w], that is completed; `UserError` if it is none."""
    assert models.generator is not None
    shape = models.generator.size
    return to_uint8(Given("image", (path,), models.vqgan, shape, shape).picture(0))


def save_map(pixels: np.ndarray, path: Path) -> Path:
    """Write uint8 [h, w] as a grey PNG."""
    with writing(path.parent):
        Image.fromarray(pixels).save(path)
    return path
