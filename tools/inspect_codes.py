"""Inspect code shards: codebook usage, images per class, and decoded samples.

    python tools/inspect_codes.py DIR [--model EXPORT] [--out FOLDER]

Writes index.html, a page that needs no network and no other file, and figures.json; given the
VQGAN that wrote the codes, also samples.png with decoded random samples.
"""

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch
from reports.html import document, section

from taming_dist import cli
from taming_dist.atomic import write_bytes
from taming_dist.data.codes import CodeDataset
from taming_dist.engine.world import choose_device
from taming_dist.errors import UserError
from taming_dist.formats.files import writing
from taming_dist.formats.names import printable
from taming_dist.formats.png import save_png
from taming_dist.formats.strict_json import write_json
from taming_dist.generation.pictures import image_grid, to_uint8
from taming_dist.losses.tokens import unigram_entropy
from taming_dist.models.vqgan import VQGAN

# Enough for stable statistics, read in seconds however large the data set is.
COUNTED_SHARDS = 128
COLUMNS, BARS = 8, 128
LISTED_CLASSES = 40


@dataclass(frozen=True)
class Counts:
    """How often each code [v] and each class [c] occurs, and the number of shards counted."""

    codes: np.ndarray
    classes: np.ndarray
    shards: int


def main(argv: Sequence[str] | None = None) -> None:
    """Read the shards, or an even selection if there are many, and write the page."""
    parser = cli.Parser(description=__doc__.partition("\n")[0])
    parser.add_argument("codes", metavar="DIR", help="code shards")
    parser.add_argument("--model", metavar="EXPORT", help="the VQGAN that wrote them")
    parser.add_argument("--out", type=Path, help="folder for the page [DIR/inspection]")
    parser.add_argument("--samples", type=cli.COUNT, default=32, help="number of decoded samples")
    parser.add_argument("--seed", type=cli.SEED, default=0, help="seed of the choice of samples")
    args = parser.parse_args(argv)
    dataset = CodeDataset.open(args.codes)
    model = None if args.model is None else load_model(args.model, dataset, args.codes)
    counts = count(dataset)
    out = args.out or Path(args.codes) / "inspection"
    figures = describe(dataset, counts)
    png = None
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        if model is not None:
            number = min(args.samples, dataset.num_samples)
            chosen = np.random.default_rng(args.seed)
            ids = chosen.choice(dataset.num_samples, number, replace=False)
            save_png(decode(model, dataset, np.sort(ids)), out / "samples.png")
            png = (out / "samples.png").read_bytes()
        write_json(out / "figures.json", figures)
        write_bytes(out / "index.html", page(args.codes, dataset, counts, figures, png).encode())
    for name, value in figures.items():
        print(f"{name:22} {value:.6g}" if isinstance(value, float) else f"{name:22} {value}")
    print(f"wrote {printable(str(out / 'index.html'))}")


def load_model(folder: str, dataset: CodeDataset, codes: str) -> VQGAN:
    """The VQGAN that wrote the codes."""
    model = VQGAN.from_pretrained(folder)
    if not model.wrote(dataset.tokenizer_fingerprint):
        raise UserError(
            f"--model {folder} has the fingerprint {model.tokenizer_fingerprint}, but {codes} was "
            f"written by {dataset.tokenizer_fingerprint}: give that VQGAN"
        )
    return model.eval().to(choose_device())


def count(dataset: CodeDataset) -> Counts:
    """Count codes and classes of at most COUNTED_SHARDS shards."""
    codes = np.zeros(dataset.vocabulary, np.int64)
    classes = np.zeros(dataset.num_classes, np.int64)
    number = min(COUNTED_SHARDS, dataset.num_shards)
    chosen = np.unique(np.linspace(0, dataset.num_shards - 1, number).round().astype(int))
    for index in chosen.tolist():
        shard = dataset.shard(index)
        codes += np.bincount(shard.codes.reshape(-1), minlength=len(codes))
        if shard.classes is not None:
            classes += np.bincount(shard.classes, minlength=len(classes))
    return Counts(codes, classes, len(chosen))


def describe(dataset: CodeDataset, counts: Counts) -> dict[str, Any]:
    """The statistics on the page."""
    found = {
        "samples": dataset.num_samples,
        "views": dataset.views,
        "grid": " x ".join(map(str, dataset.grid)),
        "vocabulary": dataset.vocabulary,
        "codebook_usage": float(np.mean(counts.codes > 0)),
        "codebook_perplexity": math.exp(float(unigram_entropy(torch.from_numpy(counts.codes)))),
        "most_frequent_share": float(counts.codes.max() / counts.codes.sum()),
        "classes": int((counts.classes > 0).sum()),
        "shards": dataset.num_shards,
        "counted_shards": counts.shards,
    }
    if dataset.text is not None:
        found["text"] = f"{dataset.text['tokens']} x {dataset.text['width']}"
        found["text_encoder"] = dataset.text["encoder"] or "not known"
    return found | {"tokenizer": dataset.tokenizer_fingerprint}


@torch.inference_mode()
def decode(model: VQGAN, dataset: CodeDataset, ids: np.ndarray) -> torch.Tensor:
    """The samples `ids` as one grid of images, uint8 [3, h, w]."""
    codes = torch.from_numpy(dataset.take(ids)["codes"].astype(np.int64))
    device = next(model.parameters()).device
    parts = [model.decode_codes(part.to(device)).float().cpu() for part in codes.split(COLUMNS)]
    pictures = torch.cat([model.config.modality.picture(part) for part in parts])
    return image_grid(to_uint8(pictures), COLUMNS)


def page(
    name: str, dataset: CodeDataset, counts: Counts, figures: dict[str, Any], png: bytes | None
) -> str:
    """The page as HTML; `png` are the decoded samples."""
    parts = [cards(figures), section("How often codes are used", histogram(counts.codes))]
    if png is not None:
        data = base64.b64encode(png).decode()
        image = f"<figure><img src='data:image/png;base64,{data}' alt='decoded samples'></figure>"
        parts.append(section("Random samples, decoded", image))
    if len(counts.classes):
        parts.append(section("Classes", class_table(dataset, counts.classes)))
    return document(f"Codes: {printable(Path(name).name or name)}", "\n".join(parts))


def cards(figures: dict[str, Any]) -> str:
    """The statistics as cards."""
    shown = {
        "samples": f"{figures['samples']:,}",
        "codes per sample": figures["grid"],
        "codebook": f"{figures['vocabulary']:,}",
        "in use": f"{figures['codebook_usage']:.1%}",
        "perplexity": f"{figures['codebook_perplexity']:,.1f}",
        "most frequent code": f"{figures['most_frequent_share']:.2%}",
    }
    entries = (f"<div class=card><span>{k}</span><b>{v}</b></div>" for k, v in shown.items())
    note = (
        f"<p>Counted in {figures['counted_shards']} of {figures['shards']} shards. Written by the "
        f"tokenizer <small>{figures['tokenizer']}</small>.</p>"
    )
    return f"<div class=cards>{''.join(entries)}</div><section>{note}</section>"


def histogram(counts: np.ndarray) -> str:
    """Codes from the most to the least frequent, as bars on a logarithmic scale."""
    share = np.sort(counts)[::-1] / counts.sum() * len(counts)
    bins = np.array([part.mean() for part in np.array_split(share, min(BARS, len(share)))])
    decades = np.log10(np.maximum(bins, 1e-3)) + 3
    heights = decades / max(decades.max(), 3.3)
    width = 100 / len(bins)
    bars = "".join(
        f"<rect x='{i * width:.3f}' y='{30 * (1 - h):.2f}' width='{width * 0.85:.3f}' "
        f"height='{30 * h:.2f}' fill='var(--accent)'/>"
        for i, h in enumerate(heights)
    )
    level = 30 * (1 - 3 / max(decades.max(), 3.3))
    line = f"<line x1='0' x2='100' y1='{level:.2f}' y2='{level:.2f}' stroke='var(--c1)' "
    line += "stroke-width='.15' stroke-dasharray='1 .6'/>"
    text = (
        "<p>Codes from the most to the least frequent, logarithmic; the dashed line is where every "
        "code is used equally often, the bottom a thousandth of it or less.</p>"
    )
    return f"{text}<figure><svg viewBox='0 0 100 30' role='img'>{bars}{line}</svg></figure>"


def class_table(dataset: CodeDataset, counts: np.ndarray) -> str:
    """The number of counted images per class; of many classes the largest and smallest."""
    order = np.argsort(-counts, kind="stable")
    if len(order) > LISTED_CLASSES:
        half = LISTED_CLASSES // 2
        order = np.concatenate([order[:half], order[-half:]])
    names = dataset.class_names or ()
    shown = [(escape(names[i]) if i < len(names) else i, counts[i]) for i in order.tolist()]
    rows = "".join(f"<tr><td>{name}</td><td><b>{n:,}</b></td></tr>" for name, n in shown)
    note = f"<p>The largest and smallest of {len(counts)}.</p>" if len(order) < len(counts) else ""
    return f"{note}<table>{rows}</table>"


if __name__ == "__main__":
    cli.run(main)
