"""The final report on code shards: codebook usage, and a check of the codes against the images.

A few samples from the finished shards are decoded and compared with their images, which are read
and encoded again: proof that the codes belong to the images that they name.
"""

import json
import math
from typing import Any

import numpy as np
import torch

from taming_dist.atomic import write_bytes
from taming_dist.formats.code_shards import CodeShard
from taming_dist.formats.manifest import Manifest
from taming_dist.formats.names import printable
from taming_dist.formats.strict_json import json_safe
from taming_dist.losses.tokens import unigram_entropy
from taming_dist.prepare.tokenization.encoder import Encoder, psnr
from taming_dist.prepare.tokenization.job import Job

REPORT = "report.json"
# Enough for stable statistics (two million images at the default size), read in seconds.
COUNTED_SHARDS = 128
PROOF_PARTS, PROOF_IMAGES = 4, 16
FIGURES = (
    "bytes_per_sample",
    "codebook_usage",
    "codebook_perplexity",
    "proven_images",
    "psnr",
    "codes_equal_to_fp32",
)


def write_report(job: Job, manifest: Manifest, encoder: Encoder) -> str:
    """Write report.json and report.txt beside the manifest; return the text."""
    shards = [shard for shard in manifest.shards if shard.samples]
    numbers = np.linspace(0, len(shards) - 1, min(COUNTED_SHARDS, len(shards))).round().astype(int)
    counts = np.zeros(job.model.config.vocabulary, np.int64)
    for number in np.unique(numbers):
        codes = CodeShard.open(job.out / shards[number].name).codes
        counts += np.bincount(codes.reshape(-1), minlength=len(counts))
    record: dict[str, Any] = {
        "images": sum(shard.samples for shard in manifest.shards),
        "views": len(job.views.names),
        "left_out": manifest.details["source"]["bad"],
        "shards": len(manifest.shards),
        "bytes_per_sample": _bytes_per_sample(job, manifest),
        "counted_codes": int(counts.sum()),
        "codebook_usage": float(np.mean(counts > 0)),
        "codebook_perplexity": math.exp(float(unigram_entropy(torch.from_numpy(counts)))),
        **_prove(job, encoder),
        "histogram": counts.tolist(),
    }
    line = json.dumps(json_safe(record), allow_nan=False)  # on one line because of the histogram
    write_bytes(job.out / REPORT, f"{line}\n".encode())
    text = _text(job, record)
    write_bytes(job.out / "report.txt", text.encode())
    return text


def _bytes_per_sample(job: Job, manifest: Manifest) -> float:
    samples = sum(shard.samples for shard in manifest.shards) * len(job.views.names)
    return sum(shard.bytes for shard in manifest.shards) / samples


def _prove(job: Job, encoder: Encoder) -> dict[str, Any]:
    """PSNR of decoded samples against their sources, and the fraction of codes equal to fp32's."""
    errors: list[float] = []
    equal: list[float] = []
    places = np.linspace(0, len(job.parts) - 1, min(PROOF_PARTS, len(job.parts)))
    for place in np.unique(places.round().astype(int)):
        part = job.parts[place]
        shard = CodeShard.open(part.path)
        rows = {int(source): row for row, source in enumerate(shard.sources)}
        stop = min(part.start + PROOF_IMAGES, part.stop)
        for batch in encoder.reader.epoch_batches(part.start, stop):
            codes = shard.codes[[rows[source] for source in batch.ids.tolist()]]
            stored = torch.from_numpy(codes.astype(np.int32)).to(encoder.device)
            equal.append(float((encoder.codes(job.model, batch, "fp32") == stored).double().mean()))
            errors += _squared_errors(job, encoder, batch, stored[:, 0])
    return {
        "proven_images": len(errors),
        "psnr": psnr(errors),
        "codes_equal_to_fp32": sum(equal) / len(equal) if equal else None,
    }


@torch.inference_mode()
def _squared_errors(job: Job, encoder: Encoder, batch: Any, codes: torch.Tensor) -> list[float]:
    """Mean squared error per image for pixels in [0, 1], of the first view as a picture."""
    modality = job.model.config.modality
    source = modality.picture(next(encoder.inputs(job.model, batch)))
    decoded = modality.picture(job.model.decode_codes(codes.long())).clamp(-1, 1)
    return ((source - decoded) / 2).square().mean((1, 2, 3)).tolist()


def _text(job: Job, record: dict[str, Any]) -> str:
    lines = [
        f"{record['images']} images in {record['shards']} code shards, "
        f"{record['left_out']} left out: {printable(str(job.out))}"
    ]
    for name in FIGURES:
        value = record[name]
        lines.append(f"{name:22} {value:.6g}" if isinstance(value, float) else f"{name:22} {value}")
    return "\n".join(lines) + "\n"
