"""Records side by side: a table for each protocol, and the course of each record."""

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from benchmarks.machine import Machine

from speedruns.records import Record
from taming_dist.cli import count

BASELINE = "original"
HEADER = (
    "recipe", "seed", "date, commit", "steps, images", "seconds",
    "to the baseline's rFID: seconds, images",
    "rFID", "LPIPS", "PSNR", "codes in use, perplexity", "log",
)  # fmt: skip
SCALES = {"seconds of training": "seconds", "images seen": "images"}
INCHES = (9.0, 3.6)


def kind(record: Record) -> tuple[str, str, str, str]:
    """What records must share to be compared: how they are measured, what they learn from, the
    device, and how much an image is compressed."""
    bits = f"{record.tokens} tokens of {record.codes:,} codes"
    return record.protocol["hash"], record.train, place(record.run.machine), bits


def place(machine: Machine) -> str:
    """The device, and of a CPU how much of it."""
    if machine.device != "CPU":
        return machine.device
    return f"{machine.cpu}, {count(machine.threads, 'thread')}"


def grouped(records: Sequence[Record]) -> list[list[Record]]:
    """Records that compare, the best first."""
    order = sorted(records, key=lambda each: (kind(each), each.last.rfid))
    return [list(some) for _, some in groupby(order, key=kind)]


def target(records: Sequence[Record]) -> float | None:
    """The rFID that the first baseline among comparable records ended with."""
    found = [each for each in records if each.recipe == BASELINE and not each.overrides]
    return min(found, key=lambda each: each.name).last.rfid if found else None


def markdown(records: Sequence[Record]) -> str:
    """The tables."""
    return "\n\n".join(table(some) for some in grouped(records))


def table(records: Sequence[Record]) -> str:
    """A table of records that compare."""
    first, aim = records[0], target(records)
    protocol = first.protocol
    _, train, device, bits = kind(first)
    lines = [
        f"Protocol {protocol['hash']}: {protocol['images']} images of {protocol['size']} px of "
        f"set {protocol['reference'][:8]}, learned from set {train[:8]}; {bits}; {device}.",
        "",
        f"| {' | '.join(HEADER)} |",
        f"|{'---|' * len(HEADER)}",
    ]
    for each in records:
        last, run = each.last, each.run
        reached = None if aim is None else each.reached(aim)
        changed = f" ({' '.join(f'`{one}`' for one in each.overrides)})" if each.overrides else ""
        dirty = ", with changes" if run.changed else ""
        cells = (
            f"`{each.recipe}`{changed}", f"{each.seed}", f"{run.date}, {run.commit[:7]}{dirty}",
            f"{last.step:,}, {last.images:,}", f"{last.seconds:.0f}",
            "not reached" if reached is None else f"{reached.seconds:.0f}, {reached.images:,}",
            f"{last.rfid:.1f}", f"{last.lpips:.3f}", f"{last.psnr:.2f} dB",
            f"{last.codebook_usage:.0%}, {last.codebook_perplexity:.0f}",
            f"[{each.log}](speedrun/{each.log})",
        )  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(records: Sequence[Record], file: Path) -> None:
    """A picture of rFID by seconds and by images seen, a row for each group that compares."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    groups = grouped(records)
    width, height = INCHES
    figure, axes = pyplot.subplots(
        len(groups), 2, squeeze=False, figsize=(width, height * len(groups)), layout="constrained"
    )
    for row, some in zip(axes, groups, strict=True):
        for axis, (label, of) in zip(row, SCALES.items(), strict=True):
            for each in some:
                xs = [getattr(point, of) for point in each.points]
                rfids = [point.rfid for point in each.points]
                axis.plot(xs, rfids, marker="o", label=f"{each.recipe}, seed {each.seed}")
            axis.set(xlabel=label, ylabel=f"rFID (protocol {some[0].protocol['hash']})")
            axis.set_xlim(left=0)
            axis.grid(alpha=0.3)
        row[0].legend()
    figure.savefig(file, dpi=110)
    pyplot.close(figure)
