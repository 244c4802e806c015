"""Measuring a second stage on code shards by its predictions, and the samples that it makes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from taming_dist.copies import to_device
from taming_dist.data.codes import CodeDataset, CodeReader
from taming_dist.engine.world import World
from taming_dist.errors import UserError
from taming_dist.evaluation.config import EvaluateConfig, refuse
from taming_dist.evaluation.folder import prepare_folder
from taming_dist.evaluation.image_sets import Comparison
from taming_dist.evaluation.progress import with_progress
from taming_dist.evaluation.protocol import Measured, Protocol
from taming_dist.evaluation.sources import Source
from taming_dist.evaluation.tokens import NllByClass, token_metrics
from taming_dist.formats.code_shards import CLASSES
from taming_dist.models.prior.orders import arrange
from taming_dist.models.prior.transformer import Transformer

Sampling = Callable[[EvaluateConfig, Transformer, World], Source]


def evaluate_transformer(config: EvaluateConfig, world: World, sampling: Sampling) -> Measured:
    """The figures of a transformer on codes of the tokenizer that it was trained on, and of `n`
    images that `sampling` makes, if that is asked for (collective).

    Raises:
        UserError: an export, shards, settings or a folder that cannot be used.
    """
    if config.n is None:
        refuse(config, ("reference", "training", "vqgan"), "it is for samples: give n=, too")
    transformer = Transformer.from_pretrained(config.model)
    facts = {"kind": Transformer.kind, "fingerprint": transformer.fingerprint}
    dataset = CodeDataset.open(config.data)
    check_codes(transformer, dataset, config.data)
    dataset.require(transformer.condition.columns)
    transformer.to(world.device)
    sampled = None if config.n is None else sampling(config, transformer, world)
    comparison = None if sampled is None else Comparison(config, world)
    prepare_folder(Path(config.out), world)
    figures = predictions(transformer, dataset, config.batch, world)
    count = dataset.num_samples
    measured = Measured(facts | {"images": count})
    asked = (count, count, dataset.fingerprint, dataset.image_size, "", "", "float32")
    measured.add(figures, Protocol(*asked))
    if sampled is not None and comparison is not None:
        comparison.add_to(measured, sampled)
    return measured


def predictions(
    transformer: Transformer, dataset: CodeDataset, batch: int, world: World
) -> dict[str, Any]:
    """The figures of `TokenMetrics` and, where there are classes, of `NllByClass`, of all codes of
    a data set, so many images at a time (collective)."""
    condition = transformer.condition
    classed = [CLASSES] if dataset.classes_present and CLASSES not in condition.columns else []
    reader = CodeReader(
        dataset,
        rank=world.rank,
        world_size=world.world_size,
        micro_batch=batch,
        columns=(*condition.columns, *classed),
    )
    metrics = token_metrics(transformer.config, dataset.image_size)
    metrics.sums = metrics.sums.to(world.device)
    by_class = NllByClass(dataset.num_classes, metrics) if dataset.classes_present else None
    if by_class is not None:
        by_class.sums = by_class.sums.to(world.device)
    vocabulary = transformer.config.vocabulary
    for some in with_progress(reader.epoch_batches(), dataset.num_samples, world):
        prefix = condition.prefix(len(some), some.columns).to(world.device)
        tokens = arrange(to_device(some.codes, world.device), transformer.places)
        pair = transformer.scheme.evaluation_pair(tokens, vocabulary)
        found = transformer(pair.inputs, prefix, None, pair.targets, hits=True)
        metrics.update(found, pair.targets, pair.weights)
        if by_class is not None:
            by_class.update(found, some.columns[CLASSES], pair.weights)
    world.sum(metrics.sums)
    figures: dict[str, Any] = dict(metrics.compute())
    if by_class is not None:
        world.sum(by_class.sums)
        figures |= by_class.compute()
    return figures


def check_codes(transformer: Transformer, dataset: CodeDataset, spec: str) -> None:
    """Raise `UserError` naming both sides if the codes do not match the transformer."""
    try:
        transformer.config.fitted(dataset, spec)
    except UserError as error:
        raise UserError(f"data: the transformer was trained on others, {error}") from error
