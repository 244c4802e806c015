"""E and G by kernels of our own beside the plain form, in fp32 and bf16, against fp64: how far off
their outputs and gradients are. Run as `python lean_worker.py OUT.json`.

On the CPU, TRITON_INTERPRET=1 has the kernels interpreted.
"""

import copy
import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from cells import Cell
from small_stage import train
from torch import Tensor, nn
from worker import batches, build

from taming_dist.engine.settings import EngineConfig
from taming_dist.engine.start import init_world, shutdown
from taming_dist.engine.world import World
from taming_dist.kernels import group_norm
from taming_dist.launch import environment_place
from taming_dist.models.autoencoder import Decoder, Encoder
from taming_dist.models.quantizers import nearest

STEPS = 2  # the GAN starts in the second
SHAPE: dict[str, Any] = {
    "latent_channels": 32,
    "channels": 32,
    "multipliers": [1, 2, 4],
    "blocks": 1,
    "attention_resolutions": [8],
    "resolution": 16,
}
# 20 x 12 pixels: no side of any level fills the tiles of a kernel
NETWORKS: dict[str, tuple[Callable[..., nn.Module], tuple[int, ...]]] = {
    "encoder": (Encoder, (2, 3, 20, 12)),
    "decoder": (Decoder, (2, 32, 5, 3)),
}


def passed(network: nn.Module, x: Tensor, upstream: Tensor | None, bf16: bool) -> dict[str, Tensor]:
    """Output and gradients of a pass, in fp64 on the CPU; `upstream`: the output's gradient."""
    network.zero_grad()
    x = x.clone().requires_grad_()
    with torch.autocast(x.device.type, torch.bfloat16) if bf16 else nullcontext():
        out = network(x)
    out.backward(upstream.to(out) if upstream is not None else torch.ones_like(out))
    assert x.grad is not None
    found = {"output": out, "input": x.grad}
    found |= {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    return {name: tensor.detach().cpu().double() for name, tensor in found.items()}


def errors(name: str, device: torch.device) -> dict[str, dict[str, float]]:
    """By precision and form: how far each tensor is from fp64, relative to its norm. Biases before
    a norm have no gradient but rounding, and are left out."""
    kind, size = NETWORKS[name]
    torch.manual_seed(0)
    network = kind(3, **SHAPE)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    x = torch.randn(size)
    exact = copy.deepcopy(network).double()
    upstream = torch.randn(exact(x.double()).shape, dtype=torch.float64)
    expected = passed(exact, x.double(), upstream, bf16=False)
    scale = expected["output"].norm()
    compared = [each for each in expected if expected[each].norm() > 1e-6 * scale]
    network, x, found = network.to(device), x.to(device), {}
    for precision in ("fp32", "bf16"):
        for form in ("plain", "lean"):
            network.lean = form == "lean"
            ours = passed(network, x, upstream.to(device), precision == "bf16")
            found[f"{precision} {form}"] = {
                each: float((ours[each] - expected[each]).norm() / expected[each].norm())
                for each in compared
            }
    return found


def searched(device: torch.device) -> dict[str, Any]:
    """What the search for codes finds: by how much its codes are farther than the nearest ones, of
    exact distances and relative to them; where codes tie; and whether NaN gets a code at all."""
    torch.manual_seed(0)
    farther = 0.0
    for vectors, codes, dim in [(70, 300, 8), (33, 129, 48), (5, 3, 4), (65, 128, 32)]:
        z, entries = torch.randn(vectors, dim), torch.randn(codes, dim)
        found = nearest(z.to(device), entries.to(device), lean=True).cpu()
        exact = torch.cdist(z.double(), entries.double())
        least = exact.min(1).values
        chosen = exact.gather(1, found[:, None])[:, 0]
        farther = max(farther, float(((chosen - least) / least).max()))
    same, lost = torch.ones(3, 8), torch.full((2, 8), torch.nan)
    ties = nearest(same.to(device), torch.ones(300, 8, device=device), lean=True)
    of_nan = nearest(lost.to(device), torch.randn(300, 8, device=device), lean=True)
    is_code = ((of_nan >= 0) & (of_nan < 300)).all()
    return {"farther": farther, "ties": ties.tolist(), "nan": bool(is_code)}


def trained(world: World, zero: int, lean: bool, how: str = "eager") -> dict[str, Any]:
    """The figures of a few steps in bf16, by one form or the other."""
    EngineConfig._is_fast = lambda self, device: lean  # type: ignore[method-assign]
    if world.device.type == "cpu":  # the interpreter takes its time for each program
        group_norm.TILE = 2**15
    recipe = build(world, Cell("vqgan", "bf16", zero, how))
    assert recipe.generator.lean == lean
    return {"lines": train(recipe, range(STEPS), STEPS, batches)}


def main() -> None:
    world = init_world(environment_place())
    found: dict[str, Any] = {name: errors(name, world.device) for name in NETWORKS}
    found["searched"] = searched(world.device)
    for form in ("plain", "lean"):
        found[f"trained {form}"] = trained(world, 2, form == "lean")
    found["trained graphs"] = trained(world, 2, lean=True, how="graphs")
    Path(sys.argv[1]).write_text(json.dumps(found))
    shutdown()


if __name__ == "__main__":
    main()
