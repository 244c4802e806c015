"""Features of the validation set's pictures, which are found once and kept."""

import torch
from torch import Tensor

from taming_dist.engine.world import World
from taming_dist.inception import inception
from taming_dist.training.distances import Distances
from taming_dist.training.recipe import Pictures
from taming_dist.training.watchdog import Progress

ALONE = World(0, 1, 0, torch.device("cpu"))
GENERATOR = torch.Generator().manual_seed(0)
REAL, MADE, LATER = torch.randint(0, 256, (3, 8, 3, 20, 20), generator=GENERATOR).byte()


class Asked:
    """Pictures of which it is known how often the real ones were asked for."""

    def __init__(self, real: Tensor = REAL) -> None:
        self.real, self.times = real, 0

    def shown(self, made: Tensor, batches: list[list[int]]) -> list[Pictures]:
        def real(ids: list[int]) -> Tensor:
            self.times += 1
            return self.real[ids]

        return [
            Pictures(made[ids], lambda ids=ids: real(ids), torch.tensor(ids)) for ids in batches
        ]


def figures(distances: Distances, pictures: list[Pictures]) -> dict[str, object]:
    return {
        n: v for n, v in distances.measure(pictures, ALONE, Progress()).items() if n != "seconds"
    }


def test_real_images_are_looked_at_once_and_the_figures_are_exactly_those_without_memory() -> None:
    network, asked, batches = inception("random"), Asked(), [[4, 0, 2], [1, 3, 5], [7, 6]]
    distances = Distances(network, "r")
    first = figures(distances, asked.shown(MADE, batches))
    later = figures(distances, asked.shown(LATER, batches))
    assert asked.times == len(batches)
    assert first == figures(Distances(network, "r"), asked.shown(MADE, batches))
    assert later == figures(Distances(network, "r"), asked.shown(LATER, batches)) != first
    assert sum(map(len, distances.known.values())) == 8
    assert all(kept.shape[1] == network.dim for kept in distances.known.values())


def test_an_image_that_can_be_read_only_once_is_kept_in_no_other_batch() -> None:
    network, asked = inception("random"), Asked()
    distances = Distances(network)
    figures(distances, asked.shown(MADE, [[0, 1, 2, 3], [4, 5, 6]]))
    found = figures(distances, asked.shown(MADE, [[0, 1, 2, 3], [4, 5, 6, 7]]))
    assert asked.times == 3
    assert found == figures(Distances(network), Asked().shown(MADE, [[0, 1, 2, 3], [4, 5, 6, 7]]))
    assert list(distances.known) == [(0, 1, 2, 3), (4, 5, 6, 7)]
