"""`tools/benchmark.py stage2`: the transformer's training step.

A class and all codes but one fill the block, and every code is predicted: by ours, through its
recipe and DeepSpeed, and by the original. By default 6 layers x 512, block 512, batches of 4 on the
CPU, and 24 x 1024, block 256, batches of 32 on a GPU.
"""

import argparse
from typing import Any

import torch

from benchmarks import flops, original
from benchmarks.cases import (
    Case,
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
from taming_dist import cli
from taming_dist.data.codes import CodeBatch
from taming_dist.engine.start import init_world, shutdown
from taming_dist.engine.world import World
from taming_dist.launch import environment_place
from taming_dist.models.prior.conditions import ClassCondition
from taming_dist.models.prior.transformer import Transformer, TransformerConfig
from taming_dist.stages.context import Context
from taming_dist.stages.prior import TokenLossConfig, TransformerRecipe
from taming_dist.training.optimization import OptimConfig

CLASSES, ROW, LR, DECAY = 1000, 16, 1e-5, 0.01
PATHS = ("taming_dist/models/prior", "taming_dist/losses/tokens.py", "taming_dist/engine",
         "taming_dist/stages/prior.py", "taming_dist/kernels/attention_cpu.py")  # fmt: skip
DEFAULTS = {
    "cpu": {"layers": 6, "width": 512, "heads": 8, "block": 512, "batch": 4},
    "cuda": {"layers": 24, "width": 1024, "heads": 16, "block": 256, "batch": 32},
}
SHORT = ["--rounds", "3", "--baseline"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common(parser, ["step"])
    for name in DEFAULTS["cpu"]:
        parser.add_argument(f"--{name}", type=cli.COUNT)
    parser.add_argument("--vocabulary", type=cli.COUNT, default=1024)
    add_engine(parser)


def run(arguments: argparse.Namespace) -> Rows:
    """Measure the step."""
    device = set_up(arguments, DEFAULTS)
    world = init_world(environment_place())
    try:
        return measured("stage2", iter([step(arguments, world)]), arguments, device)
    finally:
        shutdown()


def step(arguments: argparse.Namespace, world: World) -> Case:
    """The training step."""
    batch, block = arguments.batch, arguments.block
    config = prior(arguments)
    torch.manual_seed(0)
    codes = torch.randint(arguments.vocabulary, (batch, *config.grid))
    classes = torch.randint(min(CLASSES, arguments.vocabulary), (batch,))

    def ours(precision: str) -> Work:
        optim = OptimConfig("adamw", lr=LR, betas=[0.9, 0.95], weight_decay=DECAY)
        engine = engine_of(arguments, precision)
        recipe = TransformerRecipe(config, TokenLossConfig(), Context(optim, engine, world, batch))
        given = CodeBatch({"codes": codes, "cls": classes}, torch.arange(batch))
        return steps_of(recipe, given, batch)

    def theirs(precision: str) -> Work:
        gpt = original.GPT(Transformer(config).to(world.device))
        training = original.Stage2(gpt, LR, DECAY)

        def call() -> Any:
            prefix, tokens = classes[:, None].to(world.device), codes.flatten(1).to(world.device)
            with autocast(world.device, precision):
                return training.step(prefix, tokens)

        return call

    return Case(
        f"step of {batch} x {block} tokens, {arguments.layers} layers x {arguments.width}"
        f"{engine_name(arguments)}",
        "tokens/s",
        batch * block,
        flops.prior_step(config, batch),
        "gemm",
        PATHS,
        forms_of(arguments, ours, theirs),
    )


def prior(arguments: argparse.Namespace) -> TransformerConfig:
    """A GPT whose block is a class and a grid of codes, all but the last of which are read."""
    grid = [arguments.block // ROW, ROW] if arguments.block % ROW == 0 else [1, arguments.block]
    classes = min(CLASSES, arguments.vocabulary)
    return TransformerConfig(
        arguments.vocabulary,
        grid,
        layers=arguments.layers,
        heads=arguments.heads,
        width=arguments.width,
        condition=ClassCondition(classes),
    )
