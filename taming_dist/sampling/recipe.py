"""What made a run of pictures, so that they can be made again: it lies beside them, and in each."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import taming_dist
from taming_dist.errors import UserError
from taming_dist.formats.manifest import CODES_FORMATS, MANIFEST, resolve
from taming_dist.formats.shards import measure
from taming_dist.formats.storage import is_url
from taming_dist.formats.strict_json import json_safe
from taming_dist.models.prior.transformer import Transformer
from taming_dist.models.vqgan import VQGAN
from taming_dist.sampling.config import FILES, SampleConfig
from taming_dist.sampling.plan import Plan

FORMAT = "taming_dist.samples.v1"
PLACES = ("transformer", "vqgan", "condition_vqgan", "text_encoder")  # keys that say where
MOST_THREADS = 2**12
OWN = ("out", "from_", "log")  # keys of one command, that say nothing of its pictures


@dataclass(frozen=True)
class Recipe:
    """What made a run. `settings`: the keys of the command; `fingerprints` of the two models;
    `inputs`: a hash for each key that names files; `image`: the only one that is wanted, or None:
    all. `version`, `torch`, `device` and `threads` (of a CPU, 0 for a GPU) are those of the process
    that made a picture."""

    settings: dict[str, Any]
    fingerprints: dict[str, str]
    inputs: dict[str, str] = dataclasses.field(default_factory=dict)
    image: int | None = None
    version: str = taming_dist.__version__
    torch: str = torch.__version__
    device: str = "cpu"
    threads: int = 0

    @property
    def identity(self) -> dict[str, Any]:
        """What two runs have in common if their pictures are the same, by the names of keys."""
        known = {name for name in self.settings if name not in PLACES and name not in FILES}
        facts = {name: self.settings[name] for name in known} | {"image": self.image}
        facts |= {f"the {name}'s fingerprint": own for name, own in self.fingerprints.items()}
        return facts | {name: self.inputs.get(name) for name in FILES}

    def difference(self, other: "Recipe") -> str:
        """One thing in which another run differs, "seed=1, here 0"; empty if it is the same."""
        mine, theirs = self.identity, other.identity
        for name in sorted(mine.keys() | theirs.keys()):
            if mine.get(name) != theirs.get(name):
                if name in FILES:
                    return f"other files as {name}="
                return f"{name}={shown(theirs.get(name))}, here {shown(mine.get(name))}"
        return ""

    def record(self) -> dict[str, Any]:
        """It as JSON can hold it."""
        facts: dict[str, Any] = {"format": FORMAT} | dataclasses.asdict(self)
        image = facts.pop("image")
        return json_safe(facts if image is None else facts | {"image": image})

    def text(self, image: int) -> str:
        """What picture number `image` says in itself, as ASCII."""
        return json.dumps(self.record() | {"image": image}, allow_nan=False)

    @classmethod
    def parse(cls, record: Any, source: str) -> "Recipe":
        """The recipe in what JSON held.

        Raises:
            UserError: it is none, or of another version; names the source.
        """
        fault = fault_of(record)
        if fault:
            raise UserError(f"{source} {fault}")
        known = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: own for name, own in record.items() if name in known})


def fault_of(record: Any) -> str:
    """Why a record is no recipe of this version; empty if it is one."""
    if not isinstance(record, dict) or not isinstance(record.get("settings"), dict):
        return "has no recipe of pictures: give samples.json of a run, or one of its pictures"
    if record.get("format") != FORMAT:
        return f"is not of this version ({record.get('format', 'an older one')}, not {FORMAT})"
    texts = [record.get(name) for name in ("version", "torch", "device")]
    maps = [record.get(name) for name in ("fingerprints", "inputs")]
    texts += [own for each in maps if isinstance(each, dict) for own in each.values()]
    image, threads = record.get("image"), record.get("threads")
    sound = all(isinstance(each, dict) for each in maps)
    sound = sound and all(isinstance(text, str) for text in texts)
    sound = sound and (image is None or (type(image) is int and image >= 0))
    sound = sound and type(threads) is int and 0 <= threads <= MOST_THREADS
    return "" if sound else "has a damaged recipe: give samples.json of the run"


def shown(value: Any) -> str:
    """A value as it is typed."""
    return "null" if value is None else str(value)


def recipe_of(config: SampleConfig, plan: Plan, image: int | None = None) -> Recipe:
    """The recipe of a command; `image`: of one picture of it.

    Raises:
        UserError: a file that it names cannot be read.
    """
    models: dict[str, Transformer | VQGAN] = {
        "transformer": plan.generator.transformer,
        "vqgan": plan.generator.vqgan,
    }
    if plan.condition is not None:
        models["condition_vqgan"] = plan.condition.vqgan
    settings = dataclasses.asdict(config) | {"n": plan.request.count}
    given = {name: getattr(config, name) for name in FILES}
    device = plan.generator.transformer.device
    return Recipe(
        settings=json_safe({name: own for name, own in settings.items() if name not in OWN}),
        fingerprints={name: own.fingerprint for name, own in models.items()},
        inputs={name: hash_of(own) for name, own in given.items() if own},
        image=image,
        device=device_name(device),
        threads=torch.get_num_threads() if device.type == "cpu" else 0,
    )


def use_threads(recipe: Recipe) -> None:
    """Have the CPU compute with as many threads as made the pictures of a recipe: torch shares sums
    out among them, so that another number gives other roundings."""
    if recipe.threads and recipe.threads != torch.get_num_threads():
        torch.set_num_threads(recipe.threads)


def at_present(recipe: Recipe) -> Recipe:
    """A recipe of this process with the threads that it has now."""
    return (
        dataclasses.replace(recipe, threads=torch.get_num_threads()) if recipe.threads else recipe
    )


def device_name(device: torch.device) -> str:
    """The kind of device that pictures are the same on, to the bit."""
    return "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device)


def hash_of(given: Any) -> str:
    """A hash (hex) of the files that a key names: of their contents; of the shards of a spec their
    fingerprint, of a folder of images the names and sizes."""
    parts: list[Any]
    if isinstance(given, dict):
        parts = [[name, hash_of(own)] for name, own in sorted(given.items())]
    elif isinstance(given, list | tuple):
        parts = [hash_of(own) for own in given]
    else:
        return _hash_of_place(str(given))
    return hashlib.sha256(json.dumps(parts, allow_nan=False).encode()).hexdigest()


def _hash_of_place(place: str) -> str:
    path = Path(place)
    if not is_url(place) and path.is_file() and path.suffix != ".tar":
        return measure(path)[1]
    if not is_url(place) and path.is_dir() and not (path / MANIFEST).exists():
        facts = sorted([own.name, own.stat().st_size] for own in path.iterdir() if own.is_file())
        return hashlib.sha256(json.dumps(facts, allow_nan=False).encode()).hexdigest()
    return resolve(place, *CODES_FORMATS).fingerprint
