"""What commands read and make, for W&B: images, tokenizers, codes, transformers and samples.

Training tells it as it goes (`Sinks.artifact`); tokenization and sampling, whose workers come and
go, tell it in one go once all is made (`record`).
"""

import json
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from taming_dist.data.codes import CodesConfig
from taming_dist.data.mixture import resolve_training
from taming_dist.formats.manifest import (
    CODES_FORMATS,
    MANIFEST,
    Dataset,
    Manifest,
    resolve,
    specs_of,
)
from taming_dist.formats.shards import measure
from taming_dist.formats.storage import folder_of, is_url, shown
from taming_dist.models.export import WEIGHTS, read_fingerprint, read_kind
from taming_dist.stages.interface import Config
from taming_dist.training.artifacts import Artifact, Describe
from taming_dist.training.clock import Clock
from taming_dist.training.recipe import Measured
from taming_dist.training.wandb_sink import LogConfig, WandB, wandb_mode


def read_by(config: Config) -> list[Describe]:
    """What a training run reads: its data sets, and the exports that it names."""
    data = config.data
    of = codes if isinstance(data, CodesConfig) else images
    found: list[Describe] = [partial(of, spec) for spec in (data.train, data.val)]
    names = [config.run.init]
    names += [getattr(data, key, "") for key in ("vqgan", "condition_vqgan")]
    return found + [partial(export, name) for name in names if name]


def images(spec: Any) -> Artifact:
    """The images of a shard spec, or of a mixture of them.

    Raises:
        UserError: it has no manifest.
    """
    dataset = resolve_training(spec)
    facts = {"samples": dataset.num_samples, "shards": len(dataset.shards)}
    return Artifact("images", dataset.fingerprint, placed(spec, facts), manifest_of(dataset))


def codes(spec: Any) -> Artifact:
    """The codes of a shard spec, with the fingerprint of the tokenizer that has made them.

    Raises:
        UserError: they are not there.
    """
    dataset = resolve(spec, *CODES_FORMATS)
    facts = {
        "samples": dataset.num_samples,
        "shards": len(dataset.shards),
        "bytes": sum(shard.bytes for shard in dataset.shards),
        "tokenizer": Manifest.load(dataset.paths[0].parent).details.get("tokenizer"),
    }
    return Artifact("codes", dataset.fingerprint, placed(spec, facts), manifest_of(dataset))


def export(folder: str | Path) -> Artifact:
    """An export.

    Raises:
        UserError: it is none.
    """
    folder = Path(folder)
    kind, weights = read_kind(str(folder)), folder / WEIGHTS
    facts = placed(str(folder), {"bytes": weights.stat().st_size})
    files = (folder / "config.json",)
    return Artifact(kind, read_fingerprint(str(folder)), facts, files, weights)


def samples(folder: Path) -> Artifact:
    """The pictures of a finished run of taming_dist.sample: what made them, and all at a glance."""
    record = folder / "samples.json"
    facts = json.loads(record.read_bytes())
    told = {"pictures": len(facts["images"]), "made_with": facts["fingerprints"]}
    files = (record, folder / "grid.png")
    return Artifact("samples", measure(record)[1], placed(str(folder), told), files)


def placed(spec: Any, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Facts with where it lies: whole paths, URLs without what is secret in them."""
    if isinstance(spec, Mapping):
        parts = {name: placed(part["shards"], {})["place"] for name, part in spec.items()}
        return {**facts, "place": parts}
    places = [
        shown(each) if is_url(each) else str(Path(each).absolute()) for each in specs_of(spec)
    ]
    return {**facts, "place": places[0] if len(places) == 1 else places}


def manifest_of(dataset: Dataset) -> tuple[Path, ...]:
    """The manifest of shards that lie in one folder of this machine, however they were named."""
    folders = {folder_of(location) for location in dataset.locations}
    return tuple(
        Path(folder) / MANIFEST for folder in folders if len(folders) == 1 and not is_url(folder)
    )


def record(
    config: LogConfig,
    folder: Path,
    job: str,
    values: dict[str, Any],
    read: Iterable[Describe],
    made: Describe,
    figures: Measured,
) -> None:
    """Tell W&B of a job that is finished, as a run of its own whose id is kept in `folder`: its
    settings, what it has read and made, and its figures. Nothing happens unless that is asked
    for; W&B may fail, or take a minute, and no more."""
    if wandb_mode(config) == "disabled":
        return
    run = WandB(config, folder, str(folder), values, job)
    for describe in read:
        run.artifact(describe, made=False)
    run.artifact(made, made=True)
    run.log(Clock(1, 1, 1), figures)
    run.close(failed=False)
