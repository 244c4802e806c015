"""The nearest training images: those that LPIPS itself finds, whatever the batches."""

import pytest
import torch

from taming_dist.engine.world import World
from taming_dist.evaluation.nearest import Nearest
from taming_dist.pretrained import lpips_network

ALONE = World(0, 1, 0, torch.device("cpu"))


def images(count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, 48, 48), generator=generator, dtype=torch.uint8)


def test_they_are_those_with_the_smallest_lpips() -> None:
    lpips, given, others = lpips_network("alex", "random"), images(3, 0), images(9, 1)
    others[4] = given[1]
    nearest = Nearest(lpips, given, 2)
    for numbers in (torch.arange(0, 4), torch.arange(4, 5), torch.arange(5, 9)):
        nearest.update(others[numbers], numbers)
    nearest.gather(ALONE)
    floats = [each.float() / 127.5 - 1 for each in (given, others)]
    for row in range(3):
        expected = lpips(floats[0][row : row + 1].expand(9, -1, -1, -1), floats[1])
        best = expected.sort()
        assert nearest.numbers[row].tolist() == best.indices[:2].tolist()
        torch.testing.assert_close(nearest.distances[row], best.values[:2], atol=1e-5, rtol=1e-4)
        assert torch.equal(nearest.pictures[row], others[nearest.numbers[row]])
    found = nearest.figures([0, 1, 2])
    assert found["nearest_lpips_least"] == pytest.approx(0, abs=1e-5)
    assert found["nearest"][1]["numbers"][0] == 4


def test_of_equally_near_ones_the_first_is_found_in_any_order() -> None:
    given = images(1, 0)
    others = torch.cat([images(1, 2)] * 4)
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        nearest = Nearest(lpips_network("alex", "random"), given, 2)
        for number in order:
            nearest.update(others[number : number + 1], torch.tensor([number]))
        nearest.gather(ALONE)
        assert nearest.numbers.tolist() == [[0, 1]]
