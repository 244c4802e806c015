"""`tools/benchmark.py decoding`: one large picture from codes, whole and in tiles of several sizes.

Time, peak memory of a process of its own (on a GPU: of the device), and the largest difference from
the whole decode. The model has the paper's shape, 16 pixels per code, and random weights.
"""

import argparse
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from taming_dist import cli

MEGABYTE = 1e6


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--size", type=cli.COUNT, default=1024, help="pixels of a side")
    parser.add_argument("--channels", type=cli.COUNT, default=32, help="of the finest level")
    parser.add_argument("--rows", type=cli.COUNT, nargs="+", default=[16, 64, 256])
    parser.add_argument("--scratch", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--no-whole", action="store_true", help="leave the whole decode out")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """Decode whole and in tiles, each in a process of its own; print a table."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"{arguments.size} x {arguments.size} pixels, {arguments.channels} channels, {device}")
    print("   rows  seconds  peak MB  difference")
    figures = {}
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as folder:
        for rows in [*([] if arguments.no_whole else [0]), *arguments.rows]:
            found = launch(arguments, rows, Path(folder))
            name = f"{rows} rows" if rows else "whole"
            figures[name] = found
            print(
                f"{name.split()[0]:>7} {found['seconds']:8.1f} {found['peak'] / MEGABYTE:8.0f}"
                f" {found['difference']:11.1e}",
                flush=True,
            )
    return figures


def launch(arguments: argparse.Namespace, rows: int, folder: Path) -> dict[str, float]:
    """What one way took, measured in a new process."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    given = (theirs, arguments.size, arguments.channels, rows, folder)
    process = context.Process(target=measure, args=given)
    process.start()
    theirs.close()  # so that a process that dies ends the wait for it
    found = ours.recv()
    process.join()
    return found


@torch.no_grad()
def measure(end: Any, size: int, channels: int, rows: int, folder: Path) -> None:
    """Decode, and send what it took; the whole decode leaves its picture for the others."""
    from taming_dist.generation.tiles import decode_tiles
    from taming_dist.models.quantizers import VectorQuantizerConfig
    from taming_dist.models.vqgan import VQGAN, VQGANConfig

    torch.manual_seed(0)
    quantizer = VectorQuantizerConfig(codes=1024, dim=64)
    config = VQGANConfig(quantizer, channels=channels, attention_resolutions=[])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = VQGAN(config).eval().to(device)
    side = size // config.factor
    codes = torch.randint(1024, (side, side)).to(device)
    model.decode_codes(codes[None, :1, :1])  # what the first call loads
    before = resident()
    start = time.perf_counter()
    if rows:
        picture = torch.cat([tile.cpu() for tile in decode_tiles(model, codes, rows, folder)], 1)
    else:
        picture = model.decode_codes(codes[None])[0].cpu()
    found = {"seconds": time.perf_counter() - start, "peak": resident() - before}
    whole = folder / "whole.pt"
    if not rows:
        torch.save(picture, whole)
    known = whole.is_file()
    found["difference"] = (picture - torch.load(whole)).abs().max().item() if known else torch.nan
    end.send(found)


def resident() -> float:
    """The most bytes so far, of the device where it is a GPU."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
