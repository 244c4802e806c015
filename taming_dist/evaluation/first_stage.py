"""Measuring a first stage on image shards, by the quality of its reconstructions."""

from collections.abc import Iterator, Mapping
from pathlib import Path

from taming_dist.data.images import COLUMNS, Preprocess
from taming_dist.data.reader import Reader, Reading
from taming_dist.engine.world import World
from taming_dist.errors import UserError
from taming_dist.evaluation.config import EvaluateConfig, refuse
from taming_dist.evaluation.distribution import distances, frechet
from taming_dist.evaluation.features import Features
from taming_dist.evaluation.folder import prepare_folder
from taming_dist.evaluation.label_maps import LabelMapMetrics
from taming_dist.evaluation.pictures import Pictures
from taming_dist.evaluation.progress import with_progress
from taming_dist.evaluation.protocol import CENTRE, Measured, Protocol
from taming_dist.evaluation.reconstruction import ReconstructionMetrics
from taming_dist.evaluation.ssim import WINDOW
from taming_dist.formats.manifest import resolve
from taming_dist.generation.pictures import to_uint8
from taming_dist.inception import SPATIAL_LAYER, Inception, inception
from taming_dist.models.modalities import RGB, LabelMap, Modality
from taming_dist.models.vqgan import VQGAN, check_all_coded
from taming_dist.pretrained import lpips_digest, lpips_network


def evaluate_vqgan(config: EvaluateConfig, world: World) -> Measured:
    """The figures of a first stage's reconstructions, over all ranks; the first one writes the
    pictures, and it alone has the figures that compare features (collective).

    Raises:
        UserError: an export, shards, settings or a folder that cannot be used.
    """
    why = "reconstructions are compared with their inputs, leave it out"
    refuse(config, ("reference", "training", "vqgan", "n"), why)
    vqgan = VQGAN.from_pretrained(config.model)
    facts = {"kind": VQGAN.kind, "fingerprint": vqgan.fingerprint}
    size = config.size or vqgan.config.resolution
    vqgan.config.code_shape(size, size, "size")
    modality = vqgan.config.modality
    dataset = resolve(config.data)
    metrics = metrics_of(vqgan, size, config, world)
    network = feature_network(modality, config, world)
    reading = Reading(
        Preprocess(size),
        config.batch,
        rank=world.rank,
        world_size=world.world_size,
        columns=[modality.column],
        with_classes=False,
        threads=config.threads,
        max_bad_fraction=config.max_bad_fraction,
    )
    reader = Reader(dataset, reading)
    prepare_folder(Path(config.out), world)
    pictures = Pictures(config.pictures, dataset.num_samples)
    real, made = (None if network is None else Features.with_spatial(network) for _ in range(2))
    vqgan.to(world.device)
    metrics.sums = metrics.sums.to(world.device)
    for batch in with_progress(reader.epoch_batches(), dataset.num_samples, world):
        images = modality.tensor(modality.take(batch.columns, world.device))
        codes = vqgan.encode(images)
        check_all_coded(codes, batch.keys, f"{config.model} cannot be evaluated; retrain it")
        reconstructions = vqgan.decode_codes(codes)
        metrics.update(images, reconstructions, codes)
        shown = [to_uint8(modality.picture(part)) for part in (images, reconstructions)]
        pictures.add(shown[0], shown[1], batch.ids)
        for features, pixels in ((real, shown[0]), (made, shown[1])):
            if features is not None:
                features.add(pixels, batch.ids)
    read, bad = read_and_bad(reader, world)
    if read == bad:
        raise UserError(f"data: no image of {config.data} can be read")
    world.sum(metrics.sums)
    pictures.gather(world)
    if world.is_first:
        pictures.save(Path(config.out))
    count = read - bad
    measured = Measured(facts | {"size": size, "images": count, "bad_images": bad})
    method = COLUMNS[modality.column].method.name.lower()
    asked = (count, count, dataset.fingerprint, size, CENTRE, method)
    for figures, digest in by_network(metrics.compute(), config):
        measured.add(figures, Protocol(*asked, "float32", digest))
    if network is not None and real is not None and made is not None:
        sets = made.gathered(world), real.gathered(world)
        if world.is_first:
            own, spatial = zip(*map(network.parted, sets), strict=True)
            found = {f"r{name}": value for name, value in distances(*own).items()}
            measured.add(found, Protocol(*asked, "uint8", network.digest, network.layer))
            found = {"rsfid": frechet(*spatial)}
            measured.add(found, Protocol(*asked, "uint8", network.digest, SPATIAL_LAYER))
    return measured


def read_and_bad(reader: Reader, world: World) -> tuple[int, int]:
    """How many images all ranks tried to read, and of how many they could not (collective)."""
    counts = world.gather((reader.num_read, reader.num_bad))
    return sum(read for read, _ in counts), sum(bad for _, bad in counts)


def metrics_of(
    vqgan: VQGAN, size: int, config: EvaluateConfig, world: World
) -> ReconstructionMetrics | LabelMapMetrics:
    """What is measured of a first stage's reconstructions one by one."""
    vocabulary, modality = vqgan.config.vocabulary, vqgan.config.modality
    if isinstance(modality, LabelMap):
        return LabelMapMetrics(modality.classes, vocabulary)
    networks = {
        name: lpips_network(net, config.lpips_weights).to(world.device)
        for name, net in config.lpips_nets.items()
    }
    return ReconstructionMetrics(vocabulary, networks, ssim=size >= WINDOW)


def feature_network(modality: Modality, config: EvaluateConfig, world: World) -> Inception | None:
    """The network whose features compare sets of images, if that is asked for.

    Raises:
        UserError: these are no photographs, or the network is not there.
    """
    if config.features in (None, "none"):
        return None
    if not isinstance(modality, RGB):
        raise UserError(
            f"features={config.features}: {config.model} is a model of {modality.name}, and the "
            f"features are those of photographs; leave it out"
        )
    return inception("random" if config.features == "random" else "pretrained").to(world.device)


def by_network(
    figures: Mapping[str, float], config: EvaluateConfig
) -> Iterator[tuple[dict[str, float], str]]:
    """Part figures by the digest of the network that they depend on, which is none of most."""
    rest = dict(figures)
    for name, net in config.lpips_nets.items():
        names = {f"val_{name}", f"val_{name}_mean_colour"} & rest.keys()
        found = {each: rest.pop(each) for each in sorted(names)}
        yield found, lpips_digest(net, config.lpips_weights)
    yield rest, ""
