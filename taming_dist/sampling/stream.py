"""Images sampled on the fly: a set that is measured without being written anywhere."""

import hashlib
import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from taming_dist.engine.world import World
from taming_dist.evaluation.sources import Intake, Some
from taming_dist.formats.strict_json import json_safe
from taming_dist.sampling.plan import Plan
from taming_dist.sampling.recipe import Recipe
from taming_dist.sampling.units import units_of


@dataclass(frozen=True)
class Sampled:
    """The images of a plan, `key` of whose command says how many. The ranks take turns at its
    units, so that they are those that the sampling command would write, on any number of ranks."""

    plan: Plan
    recipe: Recipe
    key: str = "n"

    @property
    def fingerprint(self) -> str:
        """Of the models and the settings that decide the images."""
        facts = [self.recipe.fingerprints, self.recipe.settings, self.recipe.inputs]
        return hashlib.sha256(json.dumps(json_safe(facts)).encode()).hexdigest()

    def batches(self, intake: Intake, world: World) -> Iterator[Some]:
        """Yield this rank's images, in batches of the plan."""
        count = self.plan.request.count
        with tempfile.TemporaryDirectory() as scratch:
            units = units_of(count, self.plan.batch, Path(scratch), range(count))
            for unit in units[world.rank :: world.world_size]:
                pictures, pixels = [], []
                for picture in self.plan.pictures(unit):  # whose pixels are there until the next
                    pixels.append(intake.prepared_planes(picture.pixels()))
                    pictures.append(picture)
                known = [picture.facts.get("class") for picture in pictures]
                classes = None if None in known else torch.tensor(known)
                yield Some(torch.stack(pixels), torch.tensor(list(unit.images)), classes)
