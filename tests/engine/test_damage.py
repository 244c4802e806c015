"""Damage to a checkpoint is noticed, told in a line, and the one before is used."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from taming_dist.engine.checkpoint import Checkpoints
from taming_dist.engine.draft import GivenUp
from taming_dist.engine.finding import find_fault
from taming_dist.engine.meta import read_meta
from taming_dist.engine.pieces import Piece
from taming_dist.engine.snapshot import Snapshot
from taming_dist.engine.world import World
from taming_dist.errors import UserError

ALONE = World(0, 1, 0, torch.device("cpu"))


class Tensors:
    """An engine of tensors, written as real ones are."""

    def __init__(self, **tensors: torch.Tensor) -> None:
        self.tensors = tensors

    def snapshot(self) -> Snapshot:
        pieces = [Piece(f"weights/{name}", 0, values) for name, values in self.tensors.items()]
        return Snapshot(pieces, {"steps": {"a": 3}}, 0, 1)

    def load(self, folder: Path, name: str) -> None:
        raise AssertionError("is not loaded here")


def save(checkpoints: Checkpoints, images: int, **tensors: torch.Tensor) -> Path:
    engines = {"generator": Tensors(**tensors), "discriminator": Tensors(**tensors)}
    draft = checkpoints.begin(images // 4, engines, {"images": images, "recipe": {"seen": [1.5]}})
    checkpoints.write(draft, GivenUp())
    return draft.final


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    """Two checkpoints of a run."""
    checkpoints = Checkpoints(tmp_path, ALONE)
    return tuple(save(checkpoints, images, a=torch.arange(9.0)) for images in (4, 8))  # type: ignore[return-value]


def flip(bit: int) -> Callable[[Path], None]:
    """Flips a bit of a file."""

    def flips(path: Path) -> None:
        data = bytearray(path.read_bytes())
        data[bit // 8 % len(data)] ^= 1 << bit % 8
        path.write_bytes(data)

    return flips


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "a bit of the header": flip(75),
    "a bit of the middle": flip(555),
    "a bit of the end": flip(-3),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "grown": lambda path: path.write_bytes(path.read_bytes() + b"x"),
    "empty": lambda path: path.write_bytes(b""),
    "deleted": lambda path: path.unlink(),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
@pytest.mark.parametrize(
    "file",
    [
        "meta.json",
        "generator/state.json",
        "generator/rank-00000-of-00001.000.safetensors",
        "discriminator/rank-00000-of-00001.000.safetensors",
    ],
)
def test_damage_to_any_file_is_told_and_the_checkpoint_before_is_used(
    two: tuple[Path, Path], file: str, damage: Callable[[Path], Any]
) -> None:
    before, newest = two
    assert len(read_meta(newest).files) == 4
    damage(newest / file)
    said: list[str] = []
    assert Checkpoints(newest.parent, ALONE).latest_valid(said.append) == before
    (line,) = said
    assert line.startswith(f"skipping checkpoint {newest.name}: ")
    assert file in line
    assert "\n" not in line


def test_every_bit_of_meta_json_counts(two: tuple[Path, Path]) -> None:
    whole = (two[1] / "meta.json").read_bytes()
    for bit in range(8 * len(whole)):
        (two[1] / "meta.json").write_bytes(whole)
        flip(bit)(two[1] / "meta.json")
        fault = find_fault(two[1])
        assert fault is not None, bit
        assert "\n" not in fault
    (two[1] / "meta.json").write_bytes(whole)
    assert find_fault(two[1]) is None


def test_one_of_before_that_has_no_checksum_is_read(two: tuple[Path, Path]) -> None:
    path = two[1] / "meta.json"
    meta = json.loads(path.read_text())
    del meta["xxh3_128"]
    path.write_text(json.dumps(meta))
    assert find_fault(two[1]) is None


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_one_whose_weights_are_not_finite_is_told_and_the_one_before_is_used(
    two: tuple[Path, Path], poison: float
) -> None:
    checkpoints = Checkpoints(two[0].parent, ALONE)
    weights = torch.arange(9.0)
    weights[4] = poison
    newest = save(checkpoints, 12, a=torch.ones(2), b=weights)
    said: list[str] = []
    assert checkpoints.latest_valid(said.append) == two[1]
    assert said == [
        f"skipping checkpoint {newest.name}: discriminator/rank-00000-of-00001.000.safetensors "
        f"holds weights/b, which is not finite"
    ]


def test_a_run_all_of_whose_checkpoints_are_damaged_does_not_start_anew(
    two: tuple[Path, Path],
) -> None:
    for path in two:
        flip(-3)(path / "generator" / "state.json")
    said: list[str] = []
    with pytest.raises(UserError, match="holds no checkpoint that can be used .the last is") as got:
        Checkpoints(two[0].parent, ALONE).latest_valid(said.append)
    assert len(said) == 2
    assert "choose another run.name" in str(got.value)
