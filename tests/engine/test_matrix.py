"""The same losses and weights however a run is cut: ZeRO 0 to 3, 1, 2 and 4 ranks, micro-batches.

The GAN starts inside the runs; its adaptive weight is `lagged`, which alone does not depend on the
cut. Every run is compared with ZeRO 0 on one rank, in one piece and fp32. All of it is slow: the
part is for whoever works on it.

The bounds: rounding alone stays below TYPICAL, which half of the runs must keep. In the others some
number crosses a kink of the losses (a ReLU, the sign of L1, the hinge) in one run and not in the
other, which changes the gradient at once by far more; with micro-batches of a single image one rank
that accumulates sees the same jumps as four ranks.
"""

import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

WORKER = Path(__file__).with_name("matrix_worker.py")
CLIP = 0.5
LOSSES = ("loss", "rec", "perceptual", "codebook", "gan_g", "gan_d")
TYPICAL, LARGEST_LOSS, LARGEST_WEIGHT, LARGEST_WAY = 2e-6, 5e-4, 1e-2, 0.1
BF16_LOSS = 2e-2
Tensors = dict[str, Tensor]


class Cells:
    """All runs of the matrix: figures by rank and cell, weights beside them."""

    def __init__(self, found: dict[str, Any], folder: Path) -> None:
        self.found, self.folder = found, folder

    def of(self, precision: str) -> list[tuple[str, str]]:
        """(world, cell) of every run in a precision."""
        ranks = [name for name in self.found if name.endswith("-0")]
        cells = [(rank.removesuffix("-0"), cell) for rank in ranks for cell in self.found[rank]]
        return [(world, cell) for world, cell in cells if cell.startswith(precision)]

    def difference(self, world: str, cell: str, names: tuple[str, ...]) -> float:
        """The largest of some figures over all steps, relative to the reference where that is
        larger than 1."""
        lines = self.found[f"{world}-0"][cell]["lines"]
        expected = self.found["one-0"][reference(cell)]["lines"]
        assert [line.keys() for line in lines] == [line.keys() for line in expected]
        return max(
            abs(line[name] - other[name]) / max(1.0, abs(other[name]))
            for line, other in zip(lines, expected, strict=True)
            for name in names
            if name in other
        )

    def way(self, world: str, cell: str, network: str) -> float:
        """How far the weights ended from the reference's, as a share of the way these have come.

        Biases before a normalisation have no gradient but rounding, which Adam blows up to whole
        steps, and what they say is normalised away: biases are left out.
        """
        start, end = (self.weights("one", reference(cell), when) for when in ("before", "after"))
        found = self.weights(world, cell, "after")
        assert found.keys() == end.keys()
        names = [n for n in end if n.startswith(network) and not n.endswith("bias")]
        return distance(found, end, names) / distance(start, end, names)

    def weights(self, world: str, cell: str, when: str) -> Tensors:
        return load_file(self.folder / f"{world}-{cell}-{when}.safetensors")


def reference(cell: str) -> str:
    return f"fp32 {cell.split()[1]} zero0 x1"


def distance(some: Tensors, others: Tensors, names: list[str]) -> float:
    return sum(float((some[n].double() - others[n].double()).square().sum()) for n in names) ** 0.5


def check(cells: Cells) -> None:
    """Losses and weights of all runs in fp32, losses of those in bf16."""
    typical = []
    for world, cell in cells.of("fp32"):
        losses = cells.difference(world, cell, LOSSES)
        lagged = cells.difference(world, cell, ("adaptive_weight", "gan_weight"))
        ways = [cells.way(world, cell, network) for network in ("generator", "discriminator")]
        print(f"{world:4} {cell}: {losses:.1e} {lagged:.1e} {ways[0]:.1e} {ways[1]:.1e}")
        assert losses < LARGEST_LOSS, (world, cell)
        assert lagged < LARGEST_WEIGHT, (world, cell)
        assert max(ways) < LARGEST_WAY, (world, cell)
        typical.append(max(losses, lagged))
    assert statistics.median(typical) < TYPICAL
    for world, cell in cells.of("bf16"):
        losses = cells.difference(world, cell, LOSSES)
        print(f"{world:4} {cell}: {losses:.1e}")
        assert TYPICAL < losses < BF16_LOSS, (world, cell)


def check_meaning(cells: Cells) -> None:
    """The runs do what they are meant to compare."""
    for world, cell in cells.of("fp32"):
        lines = cells.found[f"{world}-0"][cell]["lines"]
        assert [line.get("adaptive_weight", -1) > 0 for line in lines] == [False, False, True, True]
        assert min(lines[-1]["gradient_norm"], lines[-1]["disc_gradient_norm"]) > CLIP
        if " ema " in cell:
            assert sum(line["codebook_revived"] for line in lines) > 0


def check_codebooks(cells: Cells) -> None:
    """The same codebook, figures included, on all ranks, to the bit."""
    for world in {name.split("-")[0] for name in cells.found}:
        ranks = [found for name, found in cells.found.items() if name.startswith(world)]
        assert all(rank == ranks[0] for rank in ranks)


@pytest.fixture(scope="module")
def part(run_worker: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Cells:
    folder = tmp_path_factory.mktemp("part")
    return Cells(run_worker(WORKER, "part", worlds=("one", "four"), folder=folder), folder)


@pytest.fixture(scope="module")
def whole(run_worker: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Cells:
    folder = tmp_path_factory.mktemp("whole")
    worlds = ("one", "two", "four")
    return Cells(run_worker(WORKER, "whole", worlds=worlds, folder=folder), folder)


@pytest.mark.slow
def test_four_ranks_give_what_one_gives(part: Cells) -> None:
    check(part)
    check_meaning(part)


@pytest.mark.slow
def test_four_ranks_hold_the_same_codebook_to_the_bit(part: Cells) -> None:
    check_codebooks(part)


@pytest.mark.slow
def test_no_cut_of_the_whole_matrix_changes_losses_or_weights(whole: Cells) -> None:
    assert len(whole.of("fp32")) == len(whole.of("bf16")) == 3 * 2 * 4 * 2
    check(whole)
    check_meaning(whole)


@pytest.mark.slow
def test_codebooks_are_the_same_bits_on_all_ranks_after_twenty_steps_of_restarts(
    whole: Cells,
) -> None:
    check_codebooks(whole)
    long = {name: run for name, run in whole.found["four-0"].items() if name.startswith("long")}
    assert len(long) == 4
    for run in long.values():
        assert len(run["restarted"]) == 20
        assert sum(run["restarted"]) > 10
