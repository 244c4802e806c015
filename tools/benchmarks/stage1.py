"""`tools/benchmark.py stage1`: the VQGAN's training step, encoding, decoding, the nearest code.

Random images and weights, LPIPS with random weights of the same shapes; ours through its recipe and
DeepSpeed, the original's arithmetic (`benchmarks.original`) with the same weights. On the CPU the
step is that of 128 px and 64 channels in batches of 2, on a GPU the paper's in batches of 16.
"""

import argparse
import copy
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from benchmarks import flops, original
from benchmarks.cases import (
    Case,
    Form,
    Work,
    add_engine,
    autocast,
    engine_name,
    engine_of,
    forms_of,
    measured,
    set_up,
    steps_of,
)
from benchmarks.cases import add_arguments as add_common
from benchmarks.rows import Rows
from taming_dist import cli, pretrained
from taming_dist.engine.start import init_world, shutdown
from taming_dist.engine.world import World
from taming_dist.launch import environment_place
from taming_dist.losses.terms import L1Config, PerceptualConfig
from taming_dist.models.discriminators import PatchGANConfig, build_discriminator
from taming_dist.models.quantizers import VectorQuantizerConfig
from taming_dist.models.quantizers.interface import nearest
from taming_dist.models.vqgan import VQGAN, VQGANConfig
from taming_dist.stages.context import Context
from taming_dist.stages.vqgan import VQGANLossConfig, VQGANRecipe
from taming_dist.training.optimization import OptimConfig

CODES, DIM, LR = 1024, 256, 1e-5
VECTORS, MANY_CODES = 4096, 16384
NETWORKS = (
    "taming_dist/models/autoencoder.py",
    "taming_dist/models/lean.py",
    "taming_dist/kernels",
    "taming_dist/engine/onednn.py",
)
MODEL = (*NETWORKS, "taming_dist/models/vqgan.py", "taming_dist/models/quantizers")
STAGE = tuple(f"taming_dist/stages/{name}.py" for name in ("vqgan", "adversary", "adaptive"))
STEP = (*MODEL, "taming_dist/models/discriminators", "taming_dist/losses", "taming_dist/engine")
DEFAULTS = {
    "cpu": {"size": 128, "channels": 64, "batch": 2, "images": 2},
    "cuda": {"size": 256, "channels": 128, "batch": 16, "images": 64},
}
SHORT = ["--rounds", "3", "--baseline"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common(parser, list(CASES))
    parser.add_argument("--size", type=cli.COUNT, help="pixels across of the step")
    parser.add_argument("--channels", type=cli.COUNT, help="of the VQGAN of the step")
    parser.add_argument("--batch", type=cli.COUNT, help="images of the step")
    parser.add_argument("--images", type=cli.COUNT, help="that are encoded and decoded at once")
    parser.add_argument("--coded-size", type=cli.COUNT, default=256, help="pixels across of them")
    parser.add_argument("--coded-channels", type=cli.COUNT, default=128, help="of their VQGAN")
    add_engine(parser)


def run(arguments: argparse.Namespace) -> Rows:
    """Measure the cases."""
    device = set_up(arguments, DEFAULTS)
    world = init_world(environment_place())
    try:
        cases = (CASES[name](arguments, world) for name in arguments.cases)
        return measured("stage1", cases, arguments, device)
    finally:
        shutdown()


def step(arguments: argparse.Namespace, world: World) -> Case:
    """The training step with the GAN on."""
    batch, size = arguments.batch, arguments.size
    config = vqgan(arguments.channels, size)
    terms = {"l1": L1Config(), "perceptual": PerceptualConfig(weights="random")}
    loss = VQGANLossConfig(terms, disc_start=0)
    pixels = torch.randint(256, (batch, 3, size, size), dtype=torch.uint8)

    def ours(precision: str) -> Work:
        engine = engine_of(arguments, precision)
        recipe = VQGANRecipe(config, loss, Context(OptimConfig(lr=LR), engine, world, batch))
        images = SimpleNamespace(columns={"image": pixels})
        return steps_of(recipe, images, batch)

    def theirs(precision: str) -> Work:
        torch.manual_seed(0)
        network = original.VQGAN(VQGAN(config).to(world.device))
        judge = original.patchgan(build_discriminator(PatchGANConfig(), 3).to(world.device))
        lpips = original.LPIPS(pretrained.lpips_network("vgg", "random")).to(world.device)
        training = original.Stage1(network, judge, lpips, lr=LR)

        def call() -> Any:
            images = pixels.to(world.device).float() / 127.5 - 1
            with autocast(world.device, precision):
                return training.step(images)

        return call

    return Case(
        f"step of {batch} images of {size} px, {arguments.channels} channels, GAN on"
        f"{engine_name(arguments)}",
        "images/s",
        batch,
        flops.vqgan_step(config, loss, batch, size),
        "conv",
        (*STEP, *STAGE),
        forms_of(arguments, ours, theirs),
    )


def agreeing(expected: Tensor, codes: Tensor) -> dict[str, float]:
    """How many of the codes are those that are expected."""
    return {"codes as the original's, %": 100 * (codes == expected).double().mean().item()}


def encode(arguments: argparse.Namespace, world: World) -> Case:
    """From images to codes."""
    size, images = arguments.coded_size, coded(arguments, world)
    ours, theirs = both(arguments, world)
    with torch.inference_mode():
        expected = theirs.encode(images)
    agreement = partial(agreeing, expected)
    return Case(
        f"encode {len(images)} images of {size} px, f{ours.config.factor}",
        "images/s",
        len(images),
        flops.encoding(ours.config, len(images), size),
        "conv",
        MODEL,
        forms_of(
            arguments,
            partial(inferring, ours.encode, images),
            partial(inferring, theirs.encode, images),
            agreement,
        )
        + lean_form(ours, lambda network: inferring(network.encode, images, "bf16"), agreement),
    )


def decode(arguments: argparse.Namespace, world: World) -> Case:
    """From codes to images."""
    size, count = arguments.coded_size, arguments.images
    ours, theirs = both(arguments, world)
    side = size // ours.config.factor
    codes = torch.randint(CODES, (count, side, side), device=world.device)
    return Case(
        f"decode {count} images of {size} px, f{ours.config.factor}",
        "images/s",
        count,
        flops.decoding(ours.config, count, size),
        "conv",
        MODEL,
        forms_of(
            arguments,
            partial(inferring, ours.decode_codes, codes),
            partial(inferring, theirs.decode_codes, codes),
        )
        + lean_form(ours, lambda network: inferring(network.decode_codes, codes, "bf16")),
    )


def codebook(arguments: argparse.Namespace, world: World) -> Case:
    """The nearest code of each vector, in fp32 always."""
    torch.manual_seed(0)
    z = torch.randn(VECTORS, DIM, device=world.device)
    entries = torch.randn(MANY_CODES, DIM, device=world.device)
    expected = original.nearest(z, entries)
    exact = argparse.Namespace(**vars(arguments) | {"precisions": arguments.precisions[:1]})
    agreement = partial(agreeing, expected)
    search = partial(nearest, z, entries, lean=True)
    kernel = [Form("our kernel", "fp32", lambda: search, agreement)] if z.is_cuda else []
    return Case(
        f"nearest of {MANY_CODES:,} codes of {DIM} numbers for {VECTORS:,} vectors",
        "vectors/s",
        VECTORS,
        flops.searching(VECTORS, MANY_CODES, DIM),
        "gemm",
        ("taming_dist/models/quantizers/interface.py", "taming_dist/engine/onednn.py"),
        forms_of(
            exact,
            lambda precision: lambda: nearest(z, entries),
            lambda precision: lambda: original.nearest(z, entries),
            agreement,
        )
        + kernel,
    )


CASES: dict[str, Callable[[argparse.Namespace, World], Case]] = {
    "step": step,
    "encode": encode,
    "decode": decode,
    "nearest": codebook,
}


def vqgan(channels: int, size: int) -> VQGANConfig:
    """The paper's f16 model, of this width, for this size."""
    return VQGANConfig(VectorQuantizerConfig(codes=CODES, dim=DIM), size, channels)


def both(arguments: argparse.Namespace, world: World) -> tuple[VQGAN, original.VQGAN]:
    """Ours and the original with the same weights."""
    torch.manual_seed(0)
    config = vqgan(arguments.coded_channels, arguments.coded_size)
    ours = VQGAN(config).to(world.device).eval()
    return ours, original.VQGAN(ours).eval()


def coded(arguments: argparse.Namespace, world: World) -> Tensor:
    """Images in [-1,1]."""
    torch.manual_seed(1)
    shape = (arguments.images, 3, arguments.coded_size, arguments.coded_size)
    return torch.rand(shape, device=world.device) * 2 - 1


def lean_form(
    ours: VQGAN,
    work: Callable[[VQGAN], Work],
    notes: Callable[[Any], dict[str, float]] | None = None,
) -> list[Form]:
    """On GPUs also by kernels of our own in bf16 (`taming_dist.models.lean`), with the same
    weights."""
    if ours.quant_conv.weight.device.type != "cuda":
        return []
    network = copy.deepcopy(ours)
    return [Form("our kernels", "bf16", lambda: work(network), notes)] if network.run_lean() else []


def inferring(function: Callable[[Tensor], Tensor], given: Tensor, precision: str) -> Work:
    """A call of a function of a network without gradients."""

    @torch.inference_mode()
    def call() -> Tensor:
        with autocast(given.device, precision):
            return function(given)

    return call
