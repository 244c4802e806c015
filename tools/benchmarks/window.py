"""`tools/benchmark.py window`: a large image through the sliding window, beside the original's way.

64 x 64 codes through a window of 16 x 16 with 256 codes of its condition, GPT of 6 layers x 512,
one image, which ours writes whole. The original reads 511 positions for every code, all logits and
a dense mask; it is plain PyTorch in fp32 written for the purpose, with the same weights, and some
of its passes are measured before and after each of ours.
"""

import argparse
import statistics
import time
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.original import as_torch_is
from benchmarks.original.stage2 import GPT, TOP_K
from taming_dist import cli
from taming_dist.engine.tf32 import EXACT, use_tf32
from taming_dist.generation.completion import Known
from taming_dist.generation.draws import uniforms
from taming_dist.generation.placement import Placement
from taming_dist.generation.precision import PRECISIONS, in_bf16
from taming_dist.generation.sampling import Sampling
from taming_dist.generation.window import write_codes
from taming_dist.models.prior.blocks import Around
from taming_dist.models.prior.conditions import CodesCondition
from taming_dist.models.prior.transformer import Transformer, TransformerConfig

VOCABULARY = 1024


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=cli.COUNT, default=2, help="of the CPU")
    parser.add_argument("--codes", type=cli.COUNT, default=64, help="codes of a side of the image")
    parser.add_argument("--window", type=cli.COUNT, default=16, help="codes of a side of it")
    parser.add_argument("--steps", type=cli.COUNT, nargs="+", default=[1, 2, 4])
    parser.add_argument("--passes", type=cli.COUNT, default=5, help="of the original, around ours")
    parser.add_argument("--batch", type=cli.COUNT, default=16, help="windows at a time")
    parser.add_argument("--precision", choices=PRECISIONS, nargs="+", default=["fp32"], help="ours")
    parser.add_argument("--layers", type=cli.COUNT, default=6)
    parser.add_argument("--width", type=cli.COUNT, default=512)
    parser.add_argument("--heads", type=cli.COUNT, default=8)


@torch.no_grad()
def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure the original before and after each of ours; print and return codes per second."""
    torch.set_num_threads(arguments.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = network(arguments).to(device)
    whole = 2 * arguments.window**2 - 1
    original = GPT(model)
    models = {"fp32": model, "bf16": in_bf16(model)}
    passes = [original_pass(original, device) for _ in range(arguments.passes)]
    figures: dict[str, Any] = {}
    sides, codes = (arguments.window,) * 2, arguments.codes**2
    for precision in arguments.precision:
        for step in arguments.steps:
            placement = Placement(sides, (arguments.codes,) * 2, step)
            seconds, read = write_image(models[precision], placement, arguments.batch)
            passes += [original_pass(original, device) for _ in range(arguments.passes)]
            figures[f"{precision}, step {step}"] = {
                "codes_per_s": codes / seconds,
                "positions_per_code": read / codes,
            }
    slow = statistics.median(passes)
    print(f"{arguments.codes} x {arguments.codes} codes, {device}, {arguments.threads} threads")
    print(f"{'':16} {'codes/s':>9} {'times':>7} {'positions read per code':>24}")
    print(f"{'original':16} {1 / slow:9.1f} {1:7.1f} {whole:24d}")
    for name, found in figures.items():
        found["times"] = found["codes_per_s"] * slow
        print(
            f"{name:16} {found['codes_per_s']:9.1f} {found['times']:7.1f}"
            f" {found['positions_per_code']:24.1f}"
        )
    return {"original": {"codes_per_s": 1 / slow, "positions_per_code": whole}} | figures


def network(arguments: argparse.Namespace) -> Transformer:
    """An untrained GPT whose condition has as many codes as its image."""
    torch.manual_seed(0)
    grid = [arguments.window, arguments.window]
    sizes = {name: getattr(arguments, name) for name in ("layers", "width", "heads")}
    config = TransformerConfig(
        VOCABULARY, grid, **sizes, condition=CodesCondition(VOCABULARY, grid)
    )
    return Transformer(config).eval()


def write_image(model: Transformer, placement: Placement, batch: int) -> tuple[float, int]:
    """Seconds in which an image is written, and positions that the network reads for it."""
    device, (height, width) = model.device, placement.image
    nothing = torch.zeros(1, height, width, dtype=torch.int64)
    condition = torch.arange(height * width).view(1, height, width) % VOCABULARY
    drawn = uniforms(0, range(1), height * width, device)
    positions = 0
    forward = model.blocks[0].forward
    use_tf32(EXACT)

    def counted(x: Tensor, around: Around) -> Tensor:
        nonlocal positions
        positions += x.shape[0] * x.shape[1]
        return forward(x, around)

    with mock.patch.object(model.blocks[0], "forward", counted):
        start = clock(device)
        for _ in write_codes(
            model, {"cond": condition}, Known(nothing, nothing.bool()), drawn,
            Sampling(top_k=TOP_K), placement, batch,
        ):  # fmt: skip
            pass
        return clock(device) - start, positions


def original_pass(original: GPT, device: torch.device) -> float:
    """Seconds in which the original chooses one code: a pass over the window and its condition."""
    length = original.positions
    ids = torch.arange(length, device=device)[None] % VOCABULARY
    as_torch_is()
    start = clock(device)
    original.drawn(original(ids)[:, length // 2])
    return clock(device) - start


def clock(device: torch.device) -> float:
    """Seconds, once the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
