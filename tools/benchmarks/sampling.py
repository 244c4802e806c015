"""`tools/benchmark.py sampling`: how long a token takes, beside the original's arithmetic.

A GPT of 6 layers x 512 by default, 256 codes of an image after 256 of its condition, fp32: the
sampler as the commands use it, and plain PyTorch written for the purpose that computes as the
original does, with the same weights: each token from a pass over all that there are, with a dense
mask (`sample`), or with keys and values that are concatenated (`sample_with_past`). On a GPU also
the recorded and the compiled step, guidance and bf16.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.machine import COPY, copy_rate, default_device, describe
from benchmarks.original import as_torch_is
from benchmarks.original.stage2 import GPT, TOP_K
from benchmarks.rows import Row, Rows, this_run
from benchmarks.tables import heading, lines
from taming_dist import cli
from taming_dist.engine.tf32 import EXACT, use_tf32
from taming_dist.generation.captured import Captured
from taming_dist.generation.precision import in_bf16
from taming_dist.generation.sampler import Sampler
from taming_dist.generation.sampling import Sampling
from taming_dist.models.prior.conditions import CodesCondition
from taming_dist.models.prior.prefix import Prefix
from taming_dist.models.prior.transformer import Transformer, TransformerConfig

VOCABULARY, GRID, TOKENS = 1024, [16, 16], 256
GUIDANCE = 3.0
PATHS = ("taming_dist/generation", "taming_dist/models/prior", "tools/benchmarks/sampling.py",
         "tools/benchmarks/original", "taming_dist/engine/onednn.py",
         "taming_dist/kernels/attention_cpu.py")  # fmt: skip
SHORT = ["--batches", "1", "8", "--repeats", "1", "--positions", "2"]
WEIGHTS, LIMIT = "limit: fp32 weights are read", "limit: and the cache, on average"
Figures = dict[str, float]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--threads", type=cli.COUNT, default=2, help="of the CPU")
    parser.add_argument("--batches", type=cli.COUNT, nargs="+", default=[1, 8])
    parser.add_argument("--repeats", type=cli.COUNT, default=3, help="runs whose median counts")
    parser.add_argument("--layers", type=cli.COUNT, default=6)
    parser.add_argument("--width", type=cli.COUNT, default=512)
    parser.add_argument("--heads", type=cli.COUNT, default=8)
    parser.add_argument("--positions", type=cli.COUNT, default=4,
                        help="how many full passes stand for those of all tokens")  # fmt: skip


@torch.no_grad()
def run(arguments: argparse.Namespace) -> Rows:
    """Measure each batch size, all cases in turn; print and give medians."""
    torch.set_num_threads(arguments.threads)
    device = default_device()
    model = network(arguments).to(device)
    bandwidth = copy_rate(device)
    begun = this_run(describe(device, {COPY: bandwidth / 1e9}))
    found: list[Row] = []
    for batch in arguments.batches:
        cases = on_gpu(model, batch) if device.type == "cuda" else {}
        cases = beside_original(model, batch, arguments.positions) | cases
        found += rows(model, batch, medians(cases, arguments.repeats), bandwidth)
    everything = Rows(begun, found)
    print("\n".join([heading(everything.run), *lines(found)]), flush=True)
    return everything


def rows(model: Transformer, batch: int, seconds: Figures, bandwidth: float) -> list[Row]:
    """A row for each way to write a token, and for the time in which what it needs is read."""
    config, bounds = model.config, limits(model, batch, bandwidth)
    case = f"{batch} x {TOKENS} tokens, {config.layers} layers x {config.width}"
    found = []
    for form, each in (seconds | bounds).items():
        row = Row("sampling", case, form, batch / each, "tokens/s", ms=1e3 * each, paths=PATHS)
        if form not in bounds:
            bound = bounds[LIMIT] / (2 if "bf16" in form else 1)
            times = seconds["original, with past"] / each
            row = replace(row, peak=COPY, share=bound / each, times=times)
        found.append(row)
    return found


def network(arguments: argparse.Namespace) -> Transformer:
    """An untrained GPT whose condition has as many codes as its image."""
    torch.manual_seed(0)
    sizes = {name: getattr(arguments, name) for name in ("layers", "width", "heads")}
    condition = CodesCondition(VOCABULARY, GRID)
    config = TransformerConfig(
        VOCABULARY, GRID, 2 * TOKENS, **sizes, condition=condition, null_prefix=True
    )
    return Transformer(config).eval()


def prefixes(batch: int, device: torch.device) -> Prefix:
    ids = torch.arange(batch * TOKENS).view(batch, TOKENS) % VOCABULARY
    return Prefix((ids.to(device),))


def beside_original(
    model: Transformer, batch: int, positions: int
) -> dict[str, Callable[[], float]]:
    """Seconds per token of the sampler and of the original's ways, each once."""
    device, prefix = model.device, prefixes(batch, model.device)
    original = GPT(model)
    check(model, original, prefix)
    ours = Sampler(model, Sampling(top_k=TOP_K))

    def with_past() -> float:
        as_torch_is()
        return timed(lambda: original.sample_with_past(prefix.parts[0], TOKENS), device) / TOKENS

    def full_passes() -> float:
        as_torch_is()
        lengths = [TOKENS + round((k + 0.5) * TOKENS / positions) for k in range(positions)]
        some = torch.zeros(batch, 2 * TOKENS, dtype=torch.int64, device=device)
        passes = [partial(original.next, some[:, :length]) for length in lengths]
        return statistics.mean(timed(one, device) for one in passes)

    return {
        "original, a pass per token": full_passes,
        "original, with past": with_past,
        "cached": partial(per_token, partial(ours.codes, prefix, 0), batch, device),
    }


def on_gpu(model: Transformer, batch: int) -> dict[str, Callable[[], float]]:
    """Seconds per token of recorded and compiled steps."""
    prefix = prefixes(batch, model.device)
    found: dict[str, Callable[[], float]] = {}
    models = {"fp32": model, "bf16": in_bf16(model)}
    for precision, one in models.items():
        for how, compiled in (("captured", False), ("compiled", True)):
            for guidance, note in ((1.0, ""), (GUIDANCE, ", guided")):
                sampling = Sampling(top_k=TOP_K, guidance=guidance)
                write = partial(Sampler(one, sampling, Captured(compiled)).codes, prefix, 0)
                write(range(batch))  # records the step
                found[f"{how}, {precision}{note}"] = partial(per_token, write, batch, model.device)
    return found


def per_token(write: Callable[[range], Tensor], batch: int, device: torch.device) -> float:
    """Seconds per token of images that are written together, fp32 as every command has it."""
    use_tf32(EXACT)
    return timed(lambda: write(range(batch)), device) / TOKENS


def medians(cases: dict[str, Callable[[], float]], repeats: int) -> Figures:
    """Median seconds per token of each case; they take turns, so that noise meets all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(repeats):
        for name, case in cases.items():
            seconds[name].append(case())
    return {name: statistics.median(found) for name, found in seconds.items()}


def limits(model: Transformer, batch: int, bandwidth: float) -> Figures:
    """Seconds in which the memory gives the weights of a token, and keys and values beside."""
    read = [*model.blocks.parameters(), *model.head.parameters()]
    weights = sum(parameter.numel() for parameter in read)
    cached = 2 * model.config.layers * model.config.width * batch * 3 * TOKENS // 2
    return {
        WEIGHTS: 4 * weights / bandwidth,
        LIMIT: 4 * (weights + cached) / bandwidth,
    }


def timed(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds until the device has done it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def check(model: Transformer, original: GPT, prefix: Prefix) -> None:
    """Both compute the same, or there is nothing to compare."""
    tokens = torch.zeros(len(prefix), 2, dtype=torch.int64, device=prefix.device)
    expected = original(torch.cat([prefix.parts[0], tokens[:, :1]], dim=1))[:, -1]
    torch.testing.assert_close(model(tokens, prefix)[:, 1], expected, atol=1e-4, rtol=1e-4)
