"""Pictures in the page: previews over time, reconstructions, samples, all within a stated size.

Files go in as they are if all of a group fit into its budget; else as WebP, smaller and smaller.
"""

import base64
import io
from collections.abc import Callable, Iterator, Sequence
from html import escape
from pathlib import Path

from PIL import Image

from reports.html import tag
from reports.reading import Picture, RunRecord
from taming_dist.errors import UserError
from taming_dist.formats.strict_json import read_json

MB = 1_000_000
PREVIEW_BYTES, EVALUATION_BYTES, SAMPLE_BYTES = 6 * MB, 2 * MB, 2 * MB
PREVIEWS = 24  # of a run, evenly spread over its course, with the first and the last
WIDTHS = (1024, 640, 400, 256, 128, 64)  # pixels, of pictures that are made smaller
WIDE = 600  # pixels, of a preview that is shown in its own size; smaller ones are doubled

Embed = Callable[[Path], str]


def fitted(files: Sequence[Path], budget: int) -> dict[Path, str]:
    """Pictures as data URIs of at most `budget` characters in all, as large as that allows; those
    of the last are left out if even the smallest are too many.

    Raises:
        UserError: a file is missing or damaged.
    """
    found: dict[Path, str] = {}
    for embed in (as_it_is, *(smaller(width) for width in WIDTHS)):
        found, left = {}, budget
        for file in dict.fromkeys(files):
            found[file] = opened(embed, file)
            left -= len(found[file])
            if left < 0:
                break
        else:
            return found
    return dict(list(found.items())[:-1])


def opened(embed: Embed, file: Path) -> str:
    """A picture embedded; `UserError` if it cannot be."""
    try:
        return embed(file)
    except FileNotFoundError as error:
        raise UserError(f"{file} is missing: write its folder again, or omit it") from error
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{file} is damaged: write its folder again, or omit it") from error


def as_it_is(file: Path) -> str:
    """The bytes of a PNG."""
    return f"data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}"


def smaller(width: int) -> Embed:
    """As WebP, of at most so many pixels across."""

    def embed(file: Path) -> str:
        buffer = io.BytesIO()
        with Image.open(file) as image:
            picture = image.convert("RGB")
        height = max(1, round(picture.height * width / picture.width))
        if picture.width > width:
            picture = picture.resize((width, height), Image.Resampling.LANCZOS)
        picture.save(buffer, format="WEBP", quality=80)
        return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"

    return embed


def img(uri: str, description: str, more: str = "") -> str:
    """An embedded image, as wide as its place."""
    return f'<img alt="{escape(description)}" src="{uri}"{more}>'


# ---- previews ----


def chosen(run: RunRecord) -> list[Picture]:
    """The previews of a run that are shown."""
    all_of, most = run.previews, PREVIEWS
    if len(all_of) <= most:
        return all_of
    return [all_of[round(place * (len(all_of) - 1) / (most - 1))] for place in range(most)]


def previews(runs: Sequence[RunRecord], uris: dict[Path, str]) -> str:
    """The previews of runs: the last of each, and with a script a slider over their course."""
    moments = sorted({each.images for run in runs for each in chosen(run) if each.file in uris})
    if not moments:
        return ""
    last = len(moments) - 1
    slider = (
        f"<label class=scrub hidden>Images seen <input type=range min=0 max={last} value={last} "
        f"step=1 data-moments='{escape(','.join(map(str, moments)))}'"
        f" aria-valuetext='{moments[-1]:,} images'>"
        f"<output>{moments[-1]:,}</output></label>"
    )
    shown = "".join(figure_of(run, uris) for run in runs if run.previews)
    return f"<div class=previews>{slider if last else ''}<div class=sheets>{shown}</div></div>"


def figure_of(run: RunRecord, uris: dict[Path, str]) -> str:
    """The previews of one run over each other, the last on top."""
    known = [each for each in chosen(run) if each.file in uris]
    images = []
    for each in known:
        text = f"Preview of {run.name} after {each.images} images. Rows: {each.rows or 'unknown'}"
        hidden = "" if each is known[-1] else " hidden"
        more = f" data-images={each.images} data-rows='{escape(each.rows)}'{hidden}"
        images.append(img(uris[each.file], text, more))
    if not known:
        return ""
    newest = known[-1]
    wide = newest.width if newest.width > WIDE else 2 * newest.width
    rows = f"Rows, from the top: {escape(newest.rows)}." if newest.rows else ""
    return (
        f"<figure class=sheet data-run={run.number} style='max-width:max(16rem,{wide}px)'>"
        f"<figcaption>{tag(run)}<span class=after>after {newest.images:,} images</span>"
        f"</figcaption>"
        f"{''.join(images)}<p class=rows-of>{rows}</p></figure>"
    )


# ---- reconstructions and samples ----


def reconstructions(evaluation: Path) -> str:
    """Pairs of an input above its reconstruction, from the evaluation's folder."""
    inputs = sorted((evaluation / "images").glob("*-input.png"))
    if not inputs:
        return ""
    outputs = [file.with_name(file.name.replace("-input", "-reconstruction")) for file in inputs]
    uris = fitted(
        [file for pair in zip(inputs, outputs, strict=True) for file in pair], EVALUATION_BYTES
    )
    pairs = [
        f"<div class=pair>{img(uris[image], 'input')}{img(uris[output], 'reconstruction')}</div>"
        for image, output in zip(inputs, outputs, strict=True)
        if output in uris
    ]
    note = "<p>Top: crops that were not used in training; bottom: their reconstructions.</p>"
    return f"{note}<div class=pairs>{''.join(pairs)}</div>"


def sample_rows(samples: Path | None, names: Sequence[str]) -> str:
    """Samples in one row per class, under the class's name.

    Raises:
        UserError: samples.json is not that of taming_dist.sample, or a picture is missing.
    """
    if samples is None:
        return ""
    by_class: dict[int | None, list[Path]] = {}
    for class_id, file in listed(samples):
        by_class.setdefault(class_id, []).append(file)
    order = sorted(by_class, key=lambda known: -1 if known is None else known)
    uris = fitted([file for class_id in order for file in by_class[class_id]], SAMPLE_BYTES)
    rows = []
    for class_id in order:
        label = "samples" if class_id is None else f"class {class_id}"
        if class_id is not None and class_id < len(names):
            label = names[class_id].replace("_", " ")
        images = "".join(
            img(uris[file], f"sample of {label}") for file in by_class[class_id] if file in uris
        )
        if images:
            rows.append(
                f"<div class=row><h3>{escape(label)}</h3><div class=strip>{images}</div></div>"
            )
    return f"<div class=rows>{''.join(rows)}</div>"


def listed(samples: Path) -> Iterator[tuple[int | None, Path]]:
    """The class and the file of each sample."""
    file = samples / "samples.json"
    listing = read_json(file)
    try:
        for image in listing["images"]:
            # a name, not a path: pictures lie beside their list
            yield image["class"], samples / Path(image["file"]).name
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{file} is no list of samples: give a folder of taming_dist.sample"
        ) from error
