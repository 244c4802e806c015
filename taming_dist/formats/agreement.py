"""Checks that code shards belong together and that a model can be trained on them."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from taming_dist.errors import UserError
from taming_dist.formats.classes import MAX_CLASSES, class_fault
from taming_dist.formats.code_shards import SHARED_FACTS, CodeShard
from taming_dist.formats.manifest import Dataset


def shared_facts(facts: Mapping[str, Any], source: Path) -> dict[str, Any]:
    """The facts that all shards of a data set share; `UserError` if they are damaged."""
    shared = {name: facts[name] for name in SHARED_FACTS if name in facts}
    try:
        _check_facts(shared)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{source} does not describe its codes correctly ({error}): delete its manifest and "
            f"run tools/tokenize_dataset.py again"
        ) from error
    return shared


def number_of_classes(details: Mapping[str, Any], folder: Path) -> int:
    """The number of classes that a manifest states; `UserError` if it states none."""
    found = details.get("num_classes")
    if type(found) is not int or found < 0:
        raise UserError(f"{folder} does not state its number of classes: tokenize again")
    return found


def _check_facts(facts: Mapping[str, Any]) -> None:
    """Raise whatever Python raises for facts that are malformed."""
    numbers = [facts["vocab"], facts["views"], *facts["grid"]]
    fingerprints = [facts["tokenizer"]["fingerprint"]]
    shapes = [facts["grid"]]
    if "condition" in facts:
        condition = facts["condition"]
        numbers += [condition["vocab"], *condition["grid"]]
        fingerprints.append(condition["fingerprint"])
        shapes.append(condition["grid"])
    if "text" in facts:
        text = facts["text"]
        numbers += [text["tokens"], text["width"]]
        fingerprints.append(text["fingerprint"])
    is_odd = any(len(shape) not in (1, 2, 3) for shape in shapes)
    if is_odd or any(type(number) is not int or number < 1 for number in numbers):
        raise ValueError("an impossible vocabulary, grid, number of views or shape of texts")
    if not all(isinstance(fingerprint, str) for fingerprint in fingerprints):
        raise ValueError("a fingerprint that is not text")


def check_agreement(
    one: Path, facts: Mapping[str, Any], other: Path, others: Mapping[str, Any]
) -> None:
    """Raise `UserError` unless the facts of two shards or folders are the same."""
    for name in SHARED_FACTS:
        if facts.get(name) != others.get(name):
            raise UserError(
                f"{one} and {other} do not match: their {name} is {facts.get(name)} and "
                f"{others.get(name)}; make both with the same tools/tokenize_dataset.py command"
            )


def check_column(dataset: Dataset, column: str) -> None:
    """Raise `UserError` if only some of the shards have a column."""
    having = [bool(entry.columns.get(column)) for entry in dataset.shards if entry.samples]
    if len(set(having)) > 1:
        one, other = (dataset.paths[having.index(there)] for there in (True, False))
        raise UserError(f"{one} has a column {column} but {other} does not: use one of the two")


def check_classes(paths: Sequence[Path]) -> None:
    """Raise `UserError` naming the first image whose class is out of range for any model.

    Tokenization refuses such classes, but older shards may hold them.
    """
    for path in paths:
        shard = CodeShard.open(path)
        if shard.classes is None:
            continue
        wrong = np.flatnonzero((shard.classes < 0) | (shard.classes >= MAX_CLASSES))
        if len(wrong):
            key, fault = shard.keys[wrong[0]], class_fault(int(shard.classes[wrong[0]]))
            raise UserError(
                f"{path}: {fault} (the image {key}): make image shards with class ids, and "
                f"tokenize them into another folder"
            )
