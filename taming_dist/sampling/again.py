"""Making a run or a picture again from its recipe: `from=samples.json` or `from=picture.png`."""

import dataclasses
import json
import types
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from PIL.PngImagePlugin import PngImageFile

from taming_dist.access import require_readable
from taming_dist.errors import UserError
from taming_dist.formats.strict_json import read_json
from taming_dist.sampling.config import FILES, SampleConfig
from taming_dist.sampling.recipe import OWN, PLACES, Recipe
from taming_dist.sampling.writers.png import KEYWORD

ANEW = (*OWN, *PLACES, *FILES)  # keys that may be given beside from=: where things are now


def read_recipe(path: str) -> Recipe:
    """The recipe in samples.json, or in one of its pictures.

    Raises:
        UserError: there is none, or it is of another version.
    """
    require_readable(path)
    if Path(path).is_dir():
        path = str(Path(path) / "samples.json")
    record = read_text(path) if path.lower().endswith(".png") else read_json(path)
    return Recipe.parse(record, f"from: {path}")


def read_text(path: str) -> Any:
    """What a PNG says of itself; only its text is read, not its pixels."""
    try:
        # not Image.open, which refuses sizes that we write; nor `text`, which decodes all pixels
        with PngImageFile(path) as picture:
            text = picture.info.get(KEYWORD, "null")
        return json.loads(text)
    except FileNotFoundError as error:
        raise UserError(f"from: there is no file {path}") from error
    except (OSError, ValueError, SyntaxError, RecursionError) as error:
        raise UserError(f"from: {path} is no PNG of a run ({error})") from error


def again(config: SampleConfig, recipe: Recipe) -> SampleConfig:
    """The command of a recipe, with the places that `config` gives anew.

    Raises:
        UserError: `config` gives something else, or the recipe has keys that this version lacks.
    """
    fields = {field.name: field for field in dataclasses.fields(SampleConfig)}
    for name, field in fields.items():
        if name not in ANEW and getattr(config, name) != field.default:
            raise UserError(f"{name}: from={config.from_} says it already, leave it out")
    hints = get_type_hints(SampleConfig)
    for name, value in recipe.settings.items():
        if name not in fields or not fits(value, hints[name]):
            raise UserError(
                f"from: {config.from_} has {name}={value}, which taming_dist {recipe.version} "
                f"wrote and this version cannot read"
            )
    if recipe.image is not None and recipe.image >= recipe.settings.get("n", 0):
        raise UserError(f"from: {config.from_} has a damaged recipe: give samples.json of the run")
    given = {name: getattr(config, name) for name in ANEW}
    anew = {name: own for name, own in given.items() if own != fields[name].default}
    return SampleConfig(**{**recipe.settings, **anew})


def fits(value: Any, hint: Any) -> bool:
    """Whether a value of JSON has the type of a field."""
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if Any in kinds or (float in kinds and type(value) is int):
        return True
    return any(type(value) is kind for kind in kinds)


def check_same(here: Recipe, recipe: Recipe, source: str) -> str:
    """See that a command is that of the recipe in `source`; gives a note if pictures may differ by
    rounding, because they were made with something else.

    Raises:
        UserError: it is not, because the exports or files are others.
    """
    difference = here.difference(recipe)
    if difference:
        raise UserError(
            f"from: {source} was made with {difference}: give the places of the same ones"
        )
    changes = [
        f"{name} {theirs}, here {mine}"
        for name in ("version", "torch", "device")
        if (theirs := getattr(recipe, name)) != (mine := getattr(here, name))
    ]
    if not changes:
        return ""
    return f"note: made with {'; '.join(changes)}: pictures may differ by rounding"
