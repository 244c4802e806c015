"""Recipes side by side, each over its seeds: a table for all that compare."""

from collections.abc import Callable, Sequence
from itertools import groupby
from statistics import mean

from benchmarks.rows import Run

from speedruns.records import Record
from speedruns.shown import BASELINE, place
from taming_dist.errors import UserError

Figure = Callable[[Record], float | None]
FIGURES: dict[str, tuple[str, Figure]] = {
    "PSNR, dB": (".2f", lambda record: record.last.psnr),
    "LPIPS": (".3f", lambda record: record.last.lpips),
    "rFID": (".1f", lambda record: record.last.rfid),
    "codes in use": (".1%", lambda record: record.last.codebook_usage),
    "perplexity": (",.0f", lambda record: record.last.codebook_perplexity),
    "images/s": (".1f", lambda record: record.images_per_second),
    "memory, GiB": (".2f", lambda record: record.memory_gib),
    "probe, nats an image": (".1f", lambda record: probed(record)),
}  # fmt: skip


def kind(record: Record) -> tuple[str, ...]:
    """What records must share to stand in one table: all but recipe and seed, and the commit, which
    each row names, as a recipe that is added later has another."""
    return (
        record.protocol["hash"], record.train, place(record.run.machine),
        f"{record.last.images}", " ".join(record.overrides),
    )  # fmt: skip


def markdown(records: Sequence[Record]) -> str:
    """The tables."""
    order = sorted(records, key=lambda each: (kind(each), each.recipe, each.seed))
    return "\n\n".join(table(list(some)) for _, some in groupby(order, key=kind))


def table(records: Sequence[Record]) -> str:
    """A table of records that compare, the recipe of the lowest rFID first.

    Raises:
        UserError: their codes were probed by different protocols.
    """
    by_recipe = [list(some) for _, some in groupby(records, key=lambda each: each.recipe)]
    by_recipe.sort(key=mean_rfid)
    base = next((mean_rfid(some) for some in by_recipe if some[0].recipe == BASELINE), None)
    names = [name for name, (_, of) in FIGURES.items() if any(of(each) for each in records)]
    header = ["recipe", "codes", "codes an image", "seeds", *names]
    header += [] if base is None else [f"rFID against `{BASELINE}`"]
    header.append("commit")
    lines = [heading(records), "", f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    for some in by_recipe:
        seeds = ", ".join(f"{each.seed}" for each in some)
        cells = [f"`{some[0].recipe}`", f"{some[0].codes:,}", f"{some[0].tokens:,}", seeds]
        cells += [over_seeds(some, *FIGURES[name]) for name in names]
        cells += [] if base is None else [f"{mean_rfid(some) / base - 1:+.0%}"]
        cells.append(", ".join(sorted({code(each.run) for each in some})))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def probed(record: Record) -> float | None:
    """Nats that a transformer takes for an image, if that was measured."""
    return None if record.probe is None else record.probe.figures["probe_nll"]


def mean_rfid(records: Sequence[Record]) -> float:
    """Over the seeds of a recipe."""
    return mean(each.last.rfid for each in records)


def over_seeds(records: Sequence[Record], form: str, of: Figure) -> str:
    """The mean of a figure, and half of what its largest and smallest values differ by."""
    values = [value for value in map(of, records) if value is not None]
    if not values:
        return ""
    if len(values) == 1:
        return f"{values[0]:{form}}"
    return f"{mean(values):{form}} ± {(max(values) - min(values)) / 2:{form}}"


def code(run: Run) -> str:
    """The commit of a run, and whether it had changes."""
    return f"{run.commit[:7] or 'unknown'}{' with changes' if run.changed else ''}"


def heading(records: Sequence[Record]) -> str:
    """What the rows of a table share."""
    record, probes = records[0], sorted({each.probe.protocol for each in records if each.probe})
    if len(probes) > 1:
        raise UserError(
            f"the codes of these records were probed by protocols {' and '.join(probes)}, which do "
            f"not compare: give all the same --probe"
        )
    protocol, last = record.protocol, record.last
    keys = " ".join(f"`{each}`" for each in record.overrides)
    return (
        f"Protocol {protocol['hash']} (rFID): {protocol['images']} images of {protocol['size']} px "
        f"of set {protocol['reference'][:8]}, learned from set {record.train[:8]}: {last.images:,} "
        f"images in {last.step:,} steps"
        f"{f'; with {keys}' if keys else ''}; {place(record.run.machine)}"
        f"{f'; probe of protocol {probes[0]}' if probes else ''}. "
        f"Mean over seeds ± half of what the largest and the smallest differ by."
    )
