"""Entry point: measure an export on a data set.

python -m taming_dist.evaluate model=EXPORT data=SPEC out=DIR

A VQGAN is measured on image shards by the quality of its reconstructions, a transformer on code
shards by its predictions; the export says which of the two it is. <out> gets metrics.json last; for
a VQGAN, before that, reconstructions.png and single images as images/000-input.png and
images/000-reconstruction.png. On Ctrl-C, SIGTERM, SIGUSR1 or SIGHUP it ends without metrics.json,
and the same command begins anew.
"""

import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from omegaconf import MISSING
from torch import Tensor

from taming_dist.config import hydra_entry
from taming_dist.copies import to_device
from taming_dist.data.codes import CodeBatch, CodeDataset, CodeReader
from taming_dist.data.images import Preprocess
from taming_dist.data.reader import MOST_THREADS, Batch, Reader, Reading
from taming_dist.engine.outcome import forget_outcome, write_outcome
from taming_dist.engine.stopping import Stopped, stoppable
from taming_dist.engine.world import choose_device
from taming_dist.errors import UserError
from taming_dist.evaluation.label_maps import LabelMapMetrics
from taming_dist.evaluation.reconstruction import ReconstructionMetrics
from taming_dist.evaluation.tokens import token_metrics
from taming_dist.formats.files import writing
from taming_dist.formats.manifest import resolve
from taming_dist.formats.png import save_png
from taming_dist.formats.strict_json import write_json
from taming_dist.generation.pictures import image_grid, to_uint8
from taming_dist.losses.perceptual import NETS, WEIGHTS
from taming_dist.models.export import read_kind
from taming_dist.models.modalities import LabelMap
from taming_dist.models.prior.orders import arrange
from taming_dist.models.prior.transformer import Transformer
from taming_dist.models.vqgan import VQGAN, check_all_coded, check_size
from taming_dist.pretrained import lpips_network
from taming_dist.ranges import check_choice, check_ranges, ranged
from taming_dist.usage import conf_dir

GRID_COLUMNS = 8
PROGRESS_PERIOD_S = 10.0

AnyBatch = TypeVar("AnyBatch", Batch, CodeBatch)


@dataclass
class EvaluateConfig:
    """What to measure; `model` is an export folder, `data` a shard spec or a list of them, `out`
    gets the results.

    `size`: pixels of the centre crops (the model's resolution if left out). `pictures`: images
    shown beside their reconstructions. `lpips_weights`: pretrained, or random (tests only).
    `max_bad_fraction`: more images that cannot be read end the evaluation.
    """

    model: str = MISSING
    data: Any = MISSING
    out: str = MISSING
    batch: int = ranged(16, at_least=1)
    size: int | None = ranged(None, at_least=1)
    pictures: int = ranged(24, at_least=0)
    lpips_net: str = "vgg"
    lpips_weights: str = "pretrained"
    max_bad_fraction: float = ranged(0.001, at_least=0, at_most=1)
    threads: int = ranged(2, at_least=1, at_most=MOST_THREADS)

    def __post_init__(self) -> None:
        check_ranges(self)
        check_choice("lpips_net", self.lpips_net, NETS)
        check_choice("lpips_weights", self.lpips_weights, WEIGHTS)


def main(config: EvaluateConfig) -> None:
    """Measure and write the metrics to `config.out`, unless this process is asked to stop.

    Raises:
        UserError: an export, shards, settings or a folder that cannot be used.
    """
    forget_outcome()
    with stoppable():
        try:
            measure(config)
        except Stopped as stopped:
            write_outcome(0, 0, finished=False, reason=f"stopped by {stopped}")
            print(
                f"stopped by {stopped}: nothing is measured yet, and the same command begins anew"
            )


def measure(config: EvaluateConfig) -> None:
    """Measure and write the metrics to `config.out`."""
    device = choose_device()
    evaluate = evaluate_vqgan if read_kind(config.model) == "vqgan" else evaluate_transformer
    path = Path(config.out) / "metrics.json"
    with writing(path.parent, "out="):
        with torch.inference_mode():
            figures = evaluate(config, device)
        record = {"model": config.model, "data": config.data} | figures
        write_json(path, record)
    for name, value in figures.items():
        if isinstance(value, list):
            continue  # a curve
        print(f"{name:24} {value:.6g}" if isinstance(value, float) else f"{name:24} {value}")
    print(f"wrote {path}")


def evaluate_vqgan(config: EvaluateConfig, device: torch.device) -> dict[str, Any]:
    """Return the metrics of a first stage's reconstructions and write the pictures."""
    vqgan = VQGAN.from_pretrained(config.model)
    fingerprint = vqgan.fingerprint
    size = config.size or vqgan.config.resolution
    check_size(size, vqgan.config.factor, "size")
    modality = vqgan.config.modality
    dataset = resolve(config.data)
    figures = first_stage_figures(vqgan, config, device)
    reading = Reading(
        Preprocess(size),
        config.batch,
        columns=[modality.column],
        with_classes=False,
        threads=config.threads,
        max_bad_fraction=config.max_bad_fraction,
    )
    reader = Reader(dataset, reading)
    prepare_folder(Path(config.out))
    pictures = Pictures(config.pictures, dataset.num_samples)
    vqgan.to(device)
    for batch in with_progress(reader.epoch_batches(), dataset.num_samples):
        images = modality.tensor(modality.take(batch.columns, device))
        codes = vqgan.encode(images)
        check_all_coded(codes, batch.keys, f"{config.model} cannot be evaluated; retrain it")
        reconstructions = vqgan.decode_codes(codes)
        figures.update(images, reconstructions, codes)
        shown = [to_uint8(modality.picture(part)).cpu() for part in (images, reconstructions)]
        pictures.add(shown[0], shown[1], batch.ids)
    if reader.num_bad == reader.num_read:
        raise UserError(f"data: no image of {config.data} can be read")
    pictures.save(Path(config.out))
    counts = {"images": reader.num_read - reader.num_bad, "bad_images": reader.num_bad}
    facts = {"kind": VQGAN.kind, "fingerprint": fingerprint, "size": size}
    return facts | counts | figures.compute()


def first_stage_figures(
    vqgan: VQGAN, config: EvaluateConfig, device: torch.device
) -> ReconstructionMetrics | LabelMapMetrics:
    """The metrics of a first stage."""
    vocabulary, modality = vqgan.config.vocabulary, vqgan.config.modality
    if isinstance(modality, LabelMap):
        return LabelMapMetrics(modality.classes, vocabulary)
    lpips = lpips_network(config.lpips_net, config.lpips_weights).to(device)
    return ReconstructionMetrics(vocabulary, lpips)


def evaluate_transformer(config: EvaluateConfig, device: torch.device) -> dict[str, Any]:
    """Return the metrics of a transformer on codes of the tokenizer that it was trained on."""
    transformer = Transformer.from_pretrained(config.model)
    fingerprint = transformer.fingerprint
    dataset = CodeDataset.open(config.data)
    check_codes(transformer, dataset, config.data)
    prepare_folder(Path(config.out))
    vocabulary, condition = transformer.config.vocabulary, transformer.condition
    metrics = token_metrics(transformer.config, dataset.image_size)
    transformer.to(device)
    reader = CodeReader(dataset, micro_batch=config.batch, columns=condition.columns)
    for batch in with_progress(reader.epoch_batches(), dataset.num_samples):
        prefix = condition.prefix(len(batch), batch.columns).to(device)
        tokens = arrange(to_device(batch.codes, device), transformer.places)
        pair = transformer.scheme.evaluation_pair(tokens, vocabulary)
        found = transformer(pair.inputs, prefix, None, pair.targets, hits=True)
        metrics.update(found, pair.targets, pair.weights)
    facts = {"kind": Transformer.kind, "fingerprint": fingerprint, "images": dataset.num_samples}
    return facts | metrics.compute()


def check_codes(transformer: Transformer, dataset: CodeDataset, spec: str) -> None:
    """Raise `UserError` naming both sides if the codes do not match the transformer."""
    try:
        transformer.config.fitted(dataset, spec)
    except UserError as error:
        raise UserError(f"data: the transformer was trained on others, {error}") from error


class Pictures:
    """A few images, spread evenly over the data set, with their reconstructions."""

    def __init__(self, count: int, num_samples: int) -> None:
        spread = np.linspace(0, num_samples - 1, min(max(count, 0), num_samples))
        self.ids = torch.from_numpy(spread.round().astype(np.int64))
        self.pairs: list[tuple[Tensor, Tensor]] = []

    def add(self, images: Tensor, reconstructions: Tensor, ids: Tensor) -> None:
        """Keep the chosen images of a batch uint8 [b, 3, h, w] with ids [b]."""
        for row in torch.isin(ids, self.ids).nonzero().flatten().tolist():
            self.pairs.append((images[row], reconstructions[row]))

    def save(self, out: Path) -> None:
        """Write each pair, and a grid with reconstructions below their inputs."""
        for number, pair in enumerate(self.pairs):
            for picture, name in zip(pair, ("input", "reconstruction"), strict=True):
                save_png(picture, out / "images" / f"{number:03d}-{name}.png")
        columns = min(GRID_COLUMNS, len(self.pairs))
        rows: list[Tensor] = []
        pairs = list(self.pairs)
        while columns and len(pairs) >= columns:  # an incomplete last row is left out
            inputs, outputs = zip(*pairs[:columns], strict=True)
            rows += [*inputs, *outputs]
            del pairs[:columns]
        if rows:
            save_png(image_grid(torch.stack(rows), columns), out / "reconstructions.png")


def prepare_folder(out: Path) -> None:
    """Make `out` exist, writable, and free of an earlier evaluation's results."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
        (out / "metrics.json").unlink(missing_ok=True)  # its presence means that all is complete
        (out / "reconstructions.png").unlink(missing_ok=True)
        for name in ("input", "reconstruction"):
            for picture in (out / "images").glob(f"[0-9]*-{name}.png"):
                picture.unlink()
    except OSError as error:
        raise UserError(f"out: cannot write to {out} ({error.strerror}), choose another") from error


def with_progress(batches: Iterator[AnyBatch], total: int) -> Iterator[AnyBatch]:
    """Pass the batches on, and report progress and speed on stderr now and then."""
    start = said = time.perf_counter()
    done = 0
    for batch in batches:
        yield batch
        done += len(batch)
        now = time.perf_counter()
        if now - said >= PROGRESS_PERIOD_S:
            said = now
            rate = done / (now - start)
            print(f"{done}/{total} images, {rate:.1f} images/s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    # in a folder of its own, where `model` and `data` are plain keys and not groups
    hydra_entry("evaluate", EvaluateConfig, main, folder=conf_dir() / "evaluate")
