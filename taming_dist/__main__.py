"""`python -m taming_dist`: which commands there are; with --version, what a bug report has to say.

Versions are read from what pip has installed, and torch is imported only where its build knows
GPUs: it alone can tell which of them work.
"""

import argparse
import importlib.util
import os
import platform
import re
import runpy
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement

from taming_dist import __version__, cli
from taming_dist.checkout import changed_files, commit_of

COMMANDS = """\
commands, each with --help:
  python -m taming_dist.train      train a VQGAN, or a transformer on its codes
  python -m taming_dist.sample     write images
  python -m taming_dist.evaluate   measure a trained model
  python -m taming_dist.demo       an interactive page for a trained model
  python -m taming_dist.clip       optimise a picture of a VQGAN toward a text

The tools that make shards and codes, and the scripts for Slurm, are in tools/ and slurm/ of a
checkout, and in share/taming_dist/ of an environment into which pip installed the package.
"""
NAME = "taming_dist"
BESIDE = ("triton",)  # brought by torch's builds for GPUs, and on CPUs by the extra [dev]
PACKAGE = Path(__file__).resolve().parent


def main() -> None:
    """Print the versions, or the commands."""
    parser = cli.Parser(
        prog=f"python -m {NAME}",
        description="Train VQGANs and the transformers on their codes.",
        epilog=COMMANDS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="versions, devices and extras")
    if not parser.parse_args().version:
        parser.print_help()
        return
    for name, value in report():
        print(f"{name:<16} {value}", flush=True)


def report() -> Iterator[tuple[str, str]]:
    """The lines for a bug report: what is there, and what of it is missing or out of its range."""
    yield NAME, f"{__version__} in {PACKAGE}{commit(PACKAGE.parent)}"
    yield "python", f"{platform.python_version()}, {platform.platform()}"
    yield "devices", f"{os.cpu_count()} CPU cores; {gpus()}"
    try:
        asked = [Requirement(text) for text in requires(NAME) or ()]
    except PackageNotFoundError:
        yield "packages", "unknown: not installed by pip, so nothing tells which are asked for"
        return
    always = [each for each in asked if each.marker is None or each.marker.evaluate({"extra": ""})]
    for each in always:
        yield each.name, installed(each) or "missing"
    for name in BESIDE:
        yield name, installed(Requirement(name)) or "none"
    for extra, wanted in extras(asked).items():
        missing = ", ".join(each.name for each in wanted if installed(each) is None)
        yield f"[{extra}]", f"missing {missing}" if missing else "there"


def installed(asked: Requirement) -> str | None:
    """The version that is there, and the range if it is outside; None if there is none."""
    try:
        found = version(asked.name)
    except PackageNotFoundError:
        return None
    fits = asked.specifier.contains(found, prereleases=True)
    return found if fits else f"{found} (not {asked.specifier})"


def extras(asked: list[Requirement]) -> dict[str, list[Requirement]]:
    """What each extra asks for on this machine."""
    found: dict[str, list[Requirement]] = {}
    for each in asked:
        for name in re.findall(r"""\bextra == ['"]([\w-]+)['"]""", str(each.marker)):
            if each.marker is not None and each.marker.evaluate({"extra": name}):
                found.setdefault(name, []).append(each)
    return found


def gpus() -> str:
    """The GPUs that torch sees."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return "GPUs unknown without torch"
    build = runpy.run_path(str(Path(spec.origin).with_name("version.py")))
    kind = next(
        (f"{name.upper()} {build[name]}" for name in ("cuda", "hip") if build.get(name)), ""
    )
    if not kind:
        return "GPUs unknown to this build of torch"
    try:
        import torch

        count = torch.cuda.device_count()
        names = [torch.cuda.get_device_name(index) for index in range(count)]
    except (ImportError, OSError, RuntimeError) as error:
        return f"GPUs unknown, torch fails: {str(error).strip().splitlines()[0]}"
    return f"{', '.join(names) or 'torch sees no GPU'} (torch for {kind})"


def commit(folder: Path) -> str:
    """ ", commit ..." of a checkout; "" elsewhere."""
    found = commit_of(folder)
    if found is None:
        return ""
    return f", commit {found}{' with changes' if changed_files(folder) else ''}"


if __name__ == "__main__":
    cli.run(main)
