"""One rank of test_ema.py: keeps an average under every ZeRO stage and says how far off it is.

Run as `python average_worker.py OUT` with torchrun's variables; writes OUT-<rank>.json.
"""

import tempfile
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from small_stage import digest, work

from taming_dist.engine.partition import build_network
from taming_dist.engine.settings import EngineConfig
from taming_dist.engine.world import World
from taming_dist.engine.zero import Engine
from taming_dist.models.prior.blocks import LlamaBlockConfig
from taming_dist.models.prior.transformer import Transformer, TransformerConfig, decay_groups
from taming_dist.training.optimization import OptimConfig

BATCH, STEPS, HALF_LIFE = 4, 6, 16
SIZES = TransformerConfig(
    vocabulary=8, grid=[2, 3], layers=1, heads=2, width=8, block=LlamaBlockConfig()
)


def build(
    world: World, zero: int, accumulation: int, beta: float = 0.9, decay: float = 0.1
) -> Engine:
    optim = OptimConfig(name="adamw", lr=0, betas=[0.5, beta], weight_decay=decay)
    micro_batch = BATCH // (world.world_size * accumulation)
    engine = EngineConfig(zero=zero, persist_below=0)
    torch.manual_seed(0)
    network = build_network(lambda: Transformer(SIZES), engine, world)
    groups = decay_groups(network, optim.weight_decay)
    return Engine(network, groups, optim, engine, world, micro_batch, accumulation, HALF_LIFE)


def train_step(engine: Engine, world: World, step: int, accumulation: int) -> None:
    tokens = torch.randint(8, (BATCH, 6), generator=torch.Generator().manual_seed(step))
    engine.set_lr(0.01)
    for part in tokens.chunk(accumulation):
        mine = part[world.rank :: world.world_size]
        logits = engine(mine, torch.zeros(len(mine), 1, dtype=torch.int64))
        engine.backward(torch.nn.functional.cross_entropy(logits.flatten(0, 1), mine.flatten()))
        engine.step()


def weights(engine: Engine) -> dict[str, torch.Tensor]:
    """The network's weights as they are, whole, on every rank."""
    found = {}
    for name, parameter in engine.module.named_parameters():
        with engine._gathered(parameter):
            found[name] = parameter.detach().clone()
    return found


def largest_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def state_of(engine: Engine) -> dict[str, Any]:
    """What an evaluation must leave as it was."""
    assert engine._average is not None
    return {
        "weights": digest(list(weights(engine).values())),
        "masters": digest(engine.masters()),
        "average": digest(engine._average.shards),
        "training": [module.training for module in engine.module.modules()],
    }


@torch.no_grad()
def answers(network: Any, root_weights: AbstractContextManager[None]) -> list[torch.Tensor]:
    """The logits of a forward pass, and those of two steps of sampling."""
    tokens, prefix = torch.arange(6)[None], torch.zeros(1, 1, dtype=torch.int64)
    found = [network(tokens, prefix)]
    with root_weights:
        logits, cache = network.begin(prefix)
        return [*found, logits, network.step(tokens[:, :1], cache)]


def evaluated(engine: Engine, expected: dict[str, torch.Tensor]) -> dict[str, float]:
    """How far the weights of an evaluation and its answers are from those of a plain network."""
    plain = Transformer(SIZES).eval()
    plain.load_state_dict(expected)
    with engine.evaluated() as network:
        assert network is engine.module
        assert not any(module.training for module in network.modules())
        found = {"used": largest_difference(expected, weights(engine))}
        pairs = zip(
            answers(network, engine.root_weights()), answers(plain, nullcontext()), strict=True
        )
        return found | {
            "answers": max(float((ours - theirs).abs().max()) for ours, theirs in pairs)
        }


def fail_to_evaluate(engine: Engine) -> None:
    try:
        with engine.evaluated():
            raise ZeroDivisionError
    except ZeroDivisionError:
        pass


def numbers_of_the_average(folder: Path) -> int:
    """How many numbers of the average all ranks have written."""
    tensors = [load_file(path) for path in folder.glob("*.safetensors")]
    return sum(
        part.numel()
        for found in tensors
        for name, part in found.items()
        if name.startswith("average/")
    )


def save_as_before(engine: Engine, folder: Path) -> None:
    """What former versions wrote: DeepSpeed's files, and this rank's part of the average."""
    inner, average, world = engine._engine, engine._average, engine.world
    inner.save_checkpoint(str(folder), tag="former", client_state={}, save_latest=False)
    assert average is not None
    tensors = {f"{index:05d}": shard for index, shard in enumerate(average.shards)}
    part = world.rank if engine.config.zero else 0
    if world.is_first or engine.config.zero:
        file = folder / "former" / f"average-rank-{part:05d}.safetensors"
        save_file(tensors | {"steps": average.steps}, file)
    world.barrier()


def check(world: World, zero: int, accumulation: int, folder: Path) -> dict[str, Any]:
    """Largest differences from a slow average of whole weights; and what looking must not do."""
    engine = build(world, zero, accumulation)
    slow = weights(engine)
    for step in range(STEPS):
        train_step(engine, world, step, accumulation)
        decay = min(0.5 ** (BATCH / HALF_LIFE), (step + 1) / (step + 11))
        slow = {name: decay * slow[name] + (1 - decay) * w for name, w in weights(engine).items()}
    engine.module.drop.eval()  # not to be woken
    before, trained = state_of(engine), weights(engine)
    found: dict[str, Any] = evaluated(engine, slow)
    exported = engine.full_state()
    found["export"] = largest_difference(slow, exported) if exported is not None else 0.0
    found["same after looking"] = state_of(engine) == before
    engine.snapshot().write(folder / "network")
    world.barrier()
    found["numbers"] = numbers_of_the_average(folder / "network")
    save_as_before(engine, folder)
    former = build(world, zero, accumulation, beta=0.99, decay=0.3)
    former.load(folder, "former")
    found["after loading one of before"] = evaluated(former, slow)["used"]
    found["same as one of before"] = state_of(former)["masters"] == before["masters"]
    other = build(world, zero, accumulation, beta=0.99, decay=0.3)
    other.load(folder, "network")
    groups = other._engine.optimizer.param_groups
    found["after loading"] = evaluated(other, slow)["used"]
    other.set_lr(0.25)
    settings = ("lr", "betas", "weight_decay")
    found["groups after loading"] = [[group[key] for key in settings] for group in groups]
    for group, first in zip(groups, engine._engine.optimizer.param_groups, strict=True):
        group |= {key: first[key] for key in settings}  # from here on as the first engine
    fail_to_evaluate(engine)
    found["masters after an error"] = digest(engine.masters()) == before["masters"]
    for one in (engine, other):  # also trains on as if nothing had been
        train_step(one, world, STEPS, accumulation)
    same = {name: torch.equal(w, weights(other)[name]) for name, w in weights(engine).items()}
    found["same after an error"] = all(same.values())
    found["average differs from the weights"] = largest_difference(slow, trained)
    return found


def runs(world: World) -> dict[str, Any]:
    results = {}
    with tempfile.TemporaryDirectory() as made:
        shared = Path(world.broadcast(made))
        for zero in range(4):
            for accumulation in (1, 2):
                folder = shared / f"{zero}-{accumulation}"
                results[f"zero{zero} x{accumulation}"] = check(world, zero, accumulation, folder)
        world.barrier()
    return results


if __name__ == "__main__":
    work(runs)
