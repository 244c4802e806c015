"""The original's condition stages: what a Net2NetTransformer makes of its condition, and ours.

Only VQGANs have tensors (below `cond_stage_model.`); what the others are, the YAML file says alone.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from taming_dist.errors import UserError
from taming_dist.models.prior.conditions import (
    ClassCondition,
    CodesCondition,
    Condition,
    CoordinatesCondition,
    ObjectCentersCondition,
    ObjectsCondition,
    Unconditional,
)
from taming_dist.models.prior.orders import Grid
from taming_dist.models.prior.transformer import TransformerConfig
from taming_dist.models.vqgan import VQGAN
from taming_dist.taming_compat.description import (
    CONDITION_STAGE,
    class_name,
    instance,
    number,
    params,
    section,
)
from taming_dist.taming_compat.first_stage import IMAGE_KEYS, export_vqgan

IS_UNCONDITIONAL, IS_FIRST_STAGE = "__is_unconditional__", "__is_first_stage__"
VQGANS = ("VQModel", "VQSegmentationModel", "GumbelVQ")


@dataclass(frozen=True)
class Tokenizer:
    """What a transformer knows of a VQGAN: `codes` in its book, `factor` pixels per code along one
    side, square images of `pixels` a side. One that is only described has no fingerprint ("")."""

    codes: int
    factor: int
    pixels: int
    fingerprint: str = ""

    @property
    def grid(self) -> Grid:
        """Return the code grid of an image."""
        return self.pixels // self.factor, self.pixels // self.factor


def tokenizer(vqgan: VQGAN) -> Tokenizer:
    """Return what a transformer knows of a VQGAN that is there."""
    config = vqgan.config
    return Tokenizer(
        config.vocabulary, config.factor, config.resolution, vqgan.tokenizer_fingerprint
    )


def described_tokenizer(description: Mapping[str, Any], name: str) -> Tokenizer | None:
    """Return what a transformer knows of a VQGAN of which only the description, under `name`, is
    there; None if that says too little."""
    said = params(description, name)
    sizes = section(said, "ddconfig")
    levels = sizes.get("ch_mult")
    if "n_embed" not in said or "resolution" not in sizes or not isinstance(levels, list):
        return None
    factor = 2 ** (len(levels) - 1)
    return Tokenizer(int(number(said, "n_embed", 0)), factor, int(number(sizes, "resolution", 0)))


class Given(NamedTuple):
    """What the user says in place of a YAML file: heads; classes (0: unconditional) or steps of
    coordinates; pixels of the condition's image, where they are not those of the image; categories
    of objects."""

    heads: int | None = None
    classes: int | None = None
    coordinates: int | None = None
    condition_size: int | None = None
    categories: int | None = None


@dataclass(frozen=True)
class Said:
    """What is known of a condition: the parameters of the model and of the training data in the
    description, what the user says, and the VQGANs of the images and of the condition (None: it has
    none)."""

    description: Mapping[str, Any]
    data: Mapping[str, Any]
    given: Given
    first: Tokenizer
    second: Tokenizer | None

    @property
    def stage(self) -> dict[str, Any]:
        """The parameters of the condition's stage."""
        return params(self.description, CONDITION_STAGE)

    @property
    def name(self) -> str | None:
        """The class of the condition's stage, or the word that stands for it; None if not said."""
        if self.description.get("unconditional"):
            return IS_UNCONDITIONAL
        return class_name(self.description, CONDITION_STAGE)


def import_condition(said: Said, rows: int) -> Condition:
    """Return the condition that the description or the user names.

    `rows`: of the table of embeddings, which it shares with the codes.

    Raises:
        UserError: neither says what it is, they contradict each other or the tensors, or there is
            no such condition here.
    """
    given, name = _given(said, rows), said.name
    if name is not None and name not in STAGES:
        raise UserError(
            f"{CONDITION_STAGE}: no condition like {name} is known here, only "
            f"{', '.join(STAGES)}; the VQGANs of the checkpoint can be had with --only"
        )
    found = given if name is None else STAGES[name](said, rows)
    if found is None and said.second is not None:
        found = _codes(said, rows)
    if found is None:
        raise UserError(
            "what the transformer is conditioned on is not in the tensors: give the original's "
            "YAML file with --config, or --classes N (0: unconditional), or --coordinates STEPS"
        )
    if given not in (None, found):
        raise UserError(
            f"--classes or --coordinates: {CONDITION_STAGE} in the YAML file is {name}, with "
            f"{found}: omit them, or give the YAML file of this very model"
        )
    if said.second is not None and not isinstance(found, CodesCondition):
        raise UserError(
            f"the condition has a VQGAN, whose codes are not model/condition={found.name}: omit "
            f"--classes and --coordinates, or give the YAML file of this very model"
        )
    return found


def _given(said: Said, rows: int) -> Condition | None:
    """The condition that the user says; None if they do not."""
    if said.given.coordinates is not None:
        return coordinates(said.given.coordinates, said.first, said.first.factor, rows)
    if said.given.classes is None:
        return None
    return ClassCondition(said.given.classes) if said.given.classes else Unconditional()


def _unconditional(said: Said, rows: int) -> Condition:
    """A start token; the original may have any, ours is the token 0."""
    for where in (said.description, said.stage):
        if number(where, "sos_token", 0):
            raise UserError(f"sos_token: {where['sos_token']} is not supported, only 0")
    return Unconditional()


def _classes(said: Said, rows: int) -> Condition:
    return ClassCondition(int(number(said.stage, "n_classes", 0)))


def _codes(said: Said, rows: int) -> Condition:
    """The codes of a second VQGAN, or of the first."""
    vqgan = said.second or described_tokenizer(said.description, CONDITION_STAGE)
    if said.name == IS_FIRST_STAGE:
        vqgan = said.second or said.first
    if vqgan is None:
        raise UserError(
            "the checkpoint has no cond_stage_model.*: import the VQGAN of its condition first, "
            "and give that export with --condition-vqgan"
        )
    size = int(number(said.description, "downsample_cond_size", -1))
    if size < 1:
        size = said.given.condition_size or said.first.pixels
    elif said.given.condition_size not in (None, size):
        raise UserError(
            f"--condition-size {said.given.condition_size}, but the YAML file says "
            f"downsample_cond_size: {size}"
        )
    vqgan = replace(vqgan, pixels=size)
    return CodesCondition(vqgan.codes, list(vqgan.grid), vqgan.fingerprint)


def _coordinates(said: Said, rows: int) -> Condition:
    factor = int(number(said.stage, "down_factor", said.first.factor))
    return coordinates(int(number(said.stage, "n_embed", 0)), said.first, factor, rows)


def coordinates(steps: int, first: Tokenizer, factor: int, rows: int) -> CoordinatesCondition:
    """Return the coordinates of the images of `first`. The original's have a token more than steps,
    for which its table may lack the row."""
    grid = list(replace(first, factor=factor).grid)
    return CoordinatesCondition(steps, grid, factor, min(steps + 1, rows))


def _objects(said: Said, rows: int) -> Condition:
    """Objects; the original's stage only names the column, the rest is said of the data."""
    key, data = said.stage.get("conditional_key"), said.data
    if key not in OBJECTS:
        raise UserError(f"conditional_key: {key} is not known, only {', '.join(OBJECTS)}")
    categories = said.given.categories or int(number(data, "no_object_classes", 0))
    if not categories:
        raise UserError(
            "how many categories the objects have is not in the checkpoint: give --categories N"
        )
    if not data.get("encode_crop", True):
        raise UserError("encode_crop: false is not supported: the objects here end with the crop")
    return OBJECTS[key](
        categories=categories,
        vocabulary=int(number(data, "no_tokens", rows)),
        objects=int(number(data, "max_objects_per_image", 30)),
        flags=[flag for name, flags in FLAGS.items() if data.get(name) for flag in flags],
        min_area=number(data, "min_object_area", 0.0),
    )


# conditional_key -> the condition
OBJECTS = {"objects_bbox": ObjectsCondition, "objects_center_points": ObjectCentersCondition}
# parameter of the training data -> the flags that tokens of objects have then
FLAGS = {
    "use_group_parameter": ["group"],
    "use_additional_parameters": ["occluded", "depiction", "inside"],
}


# the original's class, or the word in its place -> the condition
STAGES: dict[str, Callable[[Said, int], Condition]] = {
    IS_UNCONDITIONAL: _unconditional,
    "SOSProvider": _unconditional,
    "Labelator": _classes,
    "CoordStage": _coordinates,
    "DummyCondStage": _objects,
    IS_FIRST_STAGE: _codes,
    **dict.fromkeys(VQGANS, _codes),
}


# those that the original has, too
EXPORTED = (
    Unconditional,
    ClassCondition,
    CoordinatesCondition,
    ObjectsCondition,
    ObjectCentersCondition,
    CodesCondition,
)


def export_condition(
    config: TransformerConfig, vqgan: VQGAN, condition_vqgan: VQGAN | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of a transformer's condition stage, and its part of the description; its
    condition is one of `EXPORTED`.

    Raises:
        UserError: the VQGAN of the condition is not given, or is another one.
    """
    condition = config.condition
    if isinstance(condition, Unconditional):
        return {}, {"unconditional": True, CONDITION_STAGE: IS_UNCONDITIONAL}
    if isinstance(condition, ClassCondition):
        labels = instance("taming.modules.util.Labelator", {"n_classes": condition.classes})
        return {}, {"cond_stage_key": "class_label", CONDITION_STAGE: labels}
    if isinstance(condition, CoordinatesCondition):
        sizes = {"n_embed": condition.steps, "down_factor": condition.factor}
        place = instance("taming.modules.misc.coord.CoordStage", sizes)
        return {}, {"cond_stage_key": "coord", CONDITION_STAGE: place}
    if isinstance(condition, ObjectsCondition):
        key = next(key for key, kind in OBJECTS.items() if kind is type(condition))
        column = instance("taming.models.dummy_cond_stage.DummyCondStage", {"conditional_key": key})
        return {}, {"cond_stage_key": key, CONDITION_STAGE: column}
    return _export_codes(config, vqgan, condition_vqgan)


def export_data(condition: Condition) -> dict[str, Any]:
    """Return the parameters of training data that belong to a condition.

    Raises:
        UserError: the original has not these objects.
    """
    if not isinstance(condition, ObjectsCondition):
        return {}
    used = {name: set(flags) <= set(condition.flags) for name, flags in FLAGS.items()}
    if {flag for name in FLAGS if used[name] for flag in FLAGS[name]} != set(condition.flags):
        raise UserError(
            f"model.condition.flags={condition.flags}: the original uses occluded, depiction and "
            f"inside together or not at all: give the export itself"
        )
    return used | {
        "no_object_classes": condition.categories,
        "no_tokens": condition.vocabulary,
        "max_objects_per_image": condition.objects,
        "min_object_area": condition.min_area,
        "encode_crop": True,
    }


def _export_codes(
    config: TransformerConfig, vqgan: VQGAN, second: VQGAN | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """As `export_condition`, of the codes of a second VQGAN."""
    condition = config.condition
    if second is None and vqgan.wrote(condition.fingerprint):
        second = vqgan
    if second is None:
        raise UserError(
            "the checkpoint of a transformer includes the VQGAN of its condition: give it with "
            "--condition-vqgan"
        )
    if condition.fingerprint and not second.wrote(condition.fingerprint):
        raise UserError(
            f"the VQGAN of the condition has the fingerprint {second.tokenizer_fingerprint}, but "
            f"the transformer learned the codes of {condition.fingerprint}: name that VQGAN"
        )
    tensors, stage = export_vqgan(second)
    described: dict[str, Any] = {"cond_stage_key": IMAGE_KEYS[type(second.config.modality)]}
    pixels = [side * second.config.factor for side in condition.grid]
    if pixels != [side * vqgan.config.factor for side in config.grid]:
        described["downsample_cond_size"] = pixels[0]
    described[CONDITION_STAGE] = IS_FIRST_STAGE if _same(second, vqgan) else stage
    return tensors, described


def _same(one: VQGAN, other: VQGAN) -> bool:
    """Whether two VQGANs have the same tensors, whatever column they read."""
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(
        torch.equal(mine[name], theirs[name]) for name in mine
    )
