"""A run of the optimisation: what it writes, what it says, and how it ends."""

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from taming_dist.atomic import replacing
from taming_dist.copies import fetch
from taming_dist.engine.stopping import Stopped
from taming_dist.errors import Diverged, UserError
from taming_dist.formats.files import writing
from taming_dist.formats.png import write_png
from taming_dist.formats.strict_json import write_json
from taming_dist.guiding.opening import FORMAT
from taming_dist.guiding.optimise import Optimisation
from taming_dist.sampling.folder import require_writable
from taming_dist.sampling.progress import Progress
from taming_dist.sampling.recipe import Recipe
from taming_dist.sampling.writers.png import KEYWORD

PICTURE, RECORD, STEPS = "picture.png", "picture.json", "steps"
STEP_NAME = re.compile(r"\d{6,}\.png")


@dataclass
class Folder:
    """<out>: steps/000050.png and so on, picture.png, and picture.json, which says what makes them
    from the beginning on, and how far it came at the end. `losses`: [steps made, loss]."""

    out: Path
    recipe: Recipe
    losses: list[tuple[int, float]] = field(default_factory=list)

    def open(self) -> None:
        """Make it this run's: what an earlier one has written is removed.

        Raises:
            UserError: it has files of nobody's that would be replaced, or cannot be written.
        """
        require_writable(self.out)
        names = [self.out / PICTURE, self.out / RECORD, *self._steps()]
        there = [path for path in names if path.exists()]
        if there and not self._is_ours():
            raise UserError(
                f"out: {there[0]} is there already, and no {RECORD} says that this command made "
                f"it: give another folder, or remove it"
            )
        for path in there:
            path.unlink()
        self._note(0)

    def show(self, picture: Tensor, made: int) -> None:
        """Write a picture, uint8 [3, h, w], as it is after so many steps."""
        self._write(self.out / STEPS / f"{made:06d}.png", picture, made)

    def finish(self, picture: Tensor, made: int) -> None:
        """Write the picture that a run ends with."""
        self._write(self.out / PICTURE, picture, made)
        self._note(made)

    def _write(self, path: Path, picture: Tensor, made: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(self._record(made), allow_nan=False)
        with replacing(path) as file:
            write_png(picture, file, {KEYWORD: text})

    def _note(self, made: int) -> None:
        write_json(self.out / RECORD, self._record(made) | {"losses": self.losses})

    def _record(self, made: int) -> dict[str, Any]:
        return self.recipe.record() | {"format": FORMAT, "steps_made": made}

    def _steps(self) -> list[Path]:
        found = (self.out / STEPS).glob("*.png")
        return sorted(path for path in found if STEP_NAME.fullmatch(path.name))

    def _is_ours(self) -> bool:
        try:
            return json.loads((self.out / RECORD).read_bytes()).get("format") == FORMAT
        except (OSError, ValueError, AttributeError):
            return False


def run(optimisation: Optimisation, folder: Folder, every: int) -> str:
    """Make all steps, or as many as there are until this process is asked to stop, which is to
    raise `Stopped`; gives the last line.

    Raises:
        UserError: the folder cannot be used, or its disk is full.
        Diverged: the loss is not finite.
    """
    total, made, stopped = optimisation.settings.steps, 0, ""
    last: list[Tensor] = []
    progress = Progress(total, lambda: made, noun="steps", note=lambda: f"loss {value(last):.4f}")
    with writing(folder.out, "out="):
        folder.open()
        try:
            for loss in optimisation.steps():
                made += 1
                last[:] = [loss]
                if made == total or (every and made % every == 0):
                    folder.losses.append((made, value(last)))
                if every and made % every == 0 and made < total:
                    folder.show(optimisation.picture(), made)
                progress.look()
        except Stopped as signal:
            stopped = str(signal)
        folder.finish(optimisation.picture(), made)
    place = folder.out / PICTURE
    if stopped:
        return f"stopped by {stopped} after {made} of {total} steps: {place}"
    progress.end()
    return f"{total} steps, loss {value(last):.4f}: {place}"


def value(last: list[Tensor]) -> float:
    """The last loss, for which the host waits; `Diverged` if it is not finite."""
    found = float(fetch(last[0])())
    if not math.isfinite(found):
        raise Diverged("the loss is not finite: give a smaller lr, or precision=fp32")
    return found
