"""Turn image shards into code shards with a trained VQGAN; stage 2 then never runs the encoder.

    python tools/tokenize_dataset.py --model EXPORT --shards SPEC --out DIR

Also under torchrun, srun or as a Slurm job array, any number of times at once: workers divide the
work through the output folder, and the bytes do not depend on who made them. Run it again to
resume after a stop, or after appending image shards. docs/tokenization.md has the details.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from taming_dist import cli
from taming_dist.data.decoding import check_objects
from taming_dist.data.reader import num_unclassed
from taming_dist.engine.claims import STALE_S
from taming_dist.engine.outcome import forget_outcome, write_outcome
from taming_dist.engine.stopping import Stopped, stoppable
from taming_dist.engine.workers import environment_worker
from taming_dist.errors import UserError
from taming_dist.formats.manifest import Dataset, resolve
from taming_dist.formats.strict_json import json_safe, read_json
from taming_dist.lineage import codes, export, images, record
from taming_dist.models.vqgan import VQGAN
from taming_dist.prepare.tokenization.job import Job
from taming_dist.prepare.tokenization.report import FIGURES, REPORT
from taming_dist.prepare.tokenization.texts import Texts, open_texts
from taming_dist.prepare.tokenization.views import VIEWS, build_views
from taming_dist.prepare.tokenization.work import tokenize
from taming_dist.training.recipe import CODE_COUNTS
from taming_dist.training.wandb_sink import LogConfig


def main(argv: Sequence[str] | None = None) -> None:
    """Work on the shards until all are finished, or this process is asked to stop."""
    args = parse(argv)
    worker = environment_worker()
    if worker.rank == 0:
        forget_outcome()
    log = LogConfig(args.wandb, args.wandb_project, args.wandb_group)
    try:
        with stoppable():
            tokenize(make_job(args), worker, args.batch, args.threads, args.stale_after)
    except Stopped as stopped:
        if worker.rank == 0:
            done = len(list(args.out.glob("*.tar"))) * args.shard_samples
            write_outcome(done, done, finished=False, reason=f"stopped by {stopped}")
            print(f"stopped by {stopped}: finished shards are kept; the same command continues")
        return
    if worker.number == 0:
        tell(log, args)


def tell(log: LogConfig, args: argparse.Namespace) -> None:
    """Tell W&B of finished codes, if it is asked for."""
    report = read_json(args.out / REPORT)
    figures = {f"codes/{name}": report[name] for name in FIGURES if report.get(name) is not None}
    figures[f"codes/{CODE_COUNTS}"] = report["histogram"]
    exports = filter(None, (args.model, args.condition_model))
    read = [partial(images, args.shards), *(partial(export, name) for name in exports)]
    values = json_safe({name: own for name, own in vars(args).items() if name != "out"})
    record(log, args.out, "tokenize", values, read, partial(codes, str(args.out)), figures)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = cli.Parser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", required=True, help="export folder of a VQGAN")
    parser.add_argument("--shards", required=True, nargs="+", help="folder, glob or braces")
    parser.add_argument("--out", type=Path, required=True, help="folder of the code shards")
    parser.add_argument(
        "--condition-model",
        metavar="EXPORT",
        help="also write the codes that this VQGAN (of label maps, depth, ...) gives each crop",
    )
    parser.add_argument(
        "--condition-size",
        type=cli.COUNT,
        metavar="PIXELS",
        help="scale what --condition-model encodes to this side: fewer codes [that of the crop]",
    )
    parser.add_argument(
        "--coordinates", action="store_true", help="also write the place of each crop in its image"
    )
    parser.add_argument(
        "--boxes",
        action="store_true",
        help="also write the boxes in each crop of the objects in each image's .json",
    )
    parser.add_argument(
        "--text",
        metavar="COLUMN",
        help="also write the embedding of each image's text: txt, the name of a field in its .json "
        "(the first of several captions), or txt.npy or emb.npy for embeddings that are there",
    )
    parser.add_argument(
        "--text-encoder",
        metavar="FOLDER|NAME",
        help="encoder of the texts: CLIP, T5 or a sentence encoder (pip install taming-dist[text])",
    )
    parser.add_argument(
        "--text-tokens", type=cli.COUNT, metavar="N", help="tokens of a text [its limit, or 120]"
    )
    parser.add_argument(
        "--no-classes", action="store_true", help="do not read the classes of the images"
    )
    parser.add_argument("--views", choices=VIEWS, default="center", help="crops of each image")
    parser.add_argument("--crops", type=cli.COUNT, default=8, help="crops with --views random")
    parser.add_argument("--seed", type=cli.SEED, default=0, help="seed of --views random")
    parser.add_argument("--size", type=cli.COUNT, help="pixels of the square crop [as in training]")
    parser.add_argument("--batch", type=cli.COUNT, default=64, help="images per batch")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument(
        "--shard-samples", type=cli.COUNT, default=16384, help="images per code shard"
    )
    parser.add_argument(
        "--prefix",
        type=cli.file_prefix,
        default="codes-train",
        help="shards are <prefix>-000000.tar",
    )
    parser.add_argument("--threads", type=cli.COUNT, default=2, help="decoding threads per process")
    parser.add_argument(
        "--stale-after",
        type=cli.number(float, above=0),
        default=STALE_S,
        metavar="SECONDS",
        help="seconds of silence after which a worker's shard is taken over",
    )
    parser.add_argument(
        "--wandb",
        choices=["auto", "online", "offline", "disabled"],
        default="disabled",
        help="tell W&B of the finished codes: what they were made of, and their codebook's use",
    )
    parser.add_argument(
        "--wandb-project", metavar="NAME", default=LogConfig.project, help="project there"
    )
    parser.add_argument("--wandb-group", metavar="NAME", help="what the run is grouped by there")
    return parser.parse_args(argv)


def make_job(args: argparse.Namespace) -> Job:
    """Load the model and find the images; mistakes surface here, before anything is written."""
    dataset = resolve(args.shards)
    if args.boxes:
        check_objects(dataset)
    if not args.no_classes:
        note_missing_classes(dataset)
    texts = choose_texts(args, dataset)
    model = VQGAN.from_pretrained(args.model)
    size = args.size or model.config.resolution
    model.config.code_shape(size, size, "--size")
    condition_model = None
    if args.condition_model is not None:
        condition_model = VQGAN.from_pretrained(args.condition_model)
        scaled = "--size" if args.condition_size is None else "--condition-size"
        side = args.condition_size or size
        condition_model.config.code_shape(side, side, scaled)
    elif args.condition_size is not None:
        raise UserError("--condition-size is for --condition-model, which is not given")
    return Job(
        model=model,
        condition_model=condition_model,
        dataset=dataset,
        views=build_views(args.views, size, args.crops, args.seed),
        size=size,
        precision=args.precision,
        out=args.out,
        prefix=args.prefix,
        shard_samples=args.shard_samples,
        coordinates=args.coordinates,
        boxes=args.boxes,
        classes=not args.no_classes,
        condition_size=args.condition_size,
        texts=texts,
    )


def choose_texts(args: argparse.Namespace, dataset: Dataset) -> Texts | None:
    """The texts that the arguments ask for."""
    if args.text is not None:
        return open_texts(dataset, args.text, args.text_encoder, args.text_tokens)
    for key in ("text_encoder", "text_tokens"):
        if getattr(args, key) is not None:
            raise UserError(f"--{key.replace('_', '-')} requires --text COLUMN: omit it")
    return None


def note_missing_classes(dataset: Dataset) -> None:
    """Note that the codes get no classes if only some of the images have one."""
    missing = num_unclassed(dataset)
    if missing:
        print(
            f"without a class: {missing} of {dataset.num_samples} images, so the codes get none: "
            f"to train with classes, make image shards with a class for each",
            flush=True,
        )


if __name__ == "__main__":
    cli.run(main)
