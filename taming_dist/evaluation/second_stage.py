"""Measuring a second stage on code shards, by its predictions."""

from pathlib import Path

from taming_dist.copies import to_device
from taming_dist.data.codes import CodeDataset, CodeReader
from taming_dist.engine.world import World
from taming_dist.errors import UserError
from taming_dist.evaluation.config import EvaluateConfig
from taming_dist.evaluation.folder import prepare_folder
from taming_dist.evaluation.progress import with_progress
from taming_dist.evaluation.protocol import Measured, Protocol
from taming_dist.evaluation.tokens import token_metrics
from taming_dist.models.prior.orders import arrange
from taming_dist.models.prior.transformer import Transformer


def evaluate_transformer(config: EvaluateConfig, world: World) -> Measured:
    """The figures of a transformer on codes of the tokenizer that it was trained on (collective).

    Raises:
        UserError: an export, shards or a folder that cannot be used.
    """
    transformer = Transformer.from_pretrained(config.model)
    facts = {"kind": Transformer.kind, "fingerprint": transformer.fingerprint}
    dataset = CodeDataset.open(config.data)
    check_codes(transformer, dataset, config.data)
    condition = transformer.condition
    reader = CodeReader(
        dataset,
        rank=world.rank,
        world_size=world.world_size,
        micro_batch=config.batch,
        columns=condition.columns,
    )
    prepare_folder(Path(config.out), world)
    metrics = token_metrics(transformer.config, dataset.image_size)
    metrics.sums = metrics.sums.to(world.device)
    transformer.to(world.device)
    vocabulary = transformer.config.vocabulary
    for batch in with_progress(reader.epoch_batches(), dataset.num_samples, world):
        prefix = condition.prefix(len(batch), batch.columns).to(world.device)
        tokens = arrange(to_device(batch.codes, world.device), transformer.places)
        pair = transformer.scheme.evaluation_pair(tokens, vocabulary)
        found = transformer(pair.inputs, prefix, None, pair.targets, hits=True)
        metrics.update(found, pair.targets, pair.weights)
    world.sum(metrics.sums)
    count = dataset.num_samples
    measured = Measured(facts | {"images": count})
    asked = (count, count, dataset.fingerprint, dataset.image_size, "", "", "float32")
    measured.add(metrics.compute(), Protocol(*asked))
    return measured


def check_codes(transformer: Transformer, dataset: CodeDataset, spec: str) -> None:
    """Raise `UserError` naming both sides if the codes do not match the transformer."""
    try:
        transformer.config.fitted(dataset, spec)
    except UserError as error:
        raise UserError(f"data: the transformer was trained on others, {error}") from error
