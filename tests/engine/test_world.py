"""What ranks share, and how a single process meets itself."""

import torch

from taming_dist.engine.world import Agreement, World, rendezvous
from taming_dist.launch import Place


def test_a_single_process_gets_a_free_port() -> None:
    variables = rendezvous(Place(0, 1, 0, "127.0.0.1", 0))
    assert int(variables["MASTER_PORT"]) > 0
    assert (variables["RANK"], variables["WORLD_SIZE"]) == ("0", "1")


def test_collectives_of_one_rank_give_their_input_without_a_process_group() -> None:
    world = World(0, 1, 0, torch.device("cpu"))
    values = torch.tensor([1.0, 2.0])
    assert torch.equal(world.mean(world.sum(values.clone())), values)
    assert torch.equal(world.join_samples(values), values)
    agreed = Agreement(world)
    assert (agreed(True), agreed(False)) == (True, False)
    assert world.broadcast("x") == "x"
    assert world.average() is None
    world.barrier()
