"""Image shards, as training and evaluation read them."""

from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path

from taming_dist.atomic import replacing
from taming_dist.formats.manifest import IMAGES_FORMAT, Manifest
from taming_dist.formats.shards import TarWriter, read_members, write_shard
from taming_dist.sampling.picture import Picture
from taming_dist.sampling.writers.interface import Finished, Writer
from taming_dist.sampling.writers.png import encoded

SHARD_IMAGES = 1000


class ShardWriter(Writer):
    """<out>/samples-000000.tar and so on with their manifest: each picture as PNG with its recipe
    in a text chunk, and its class, if it has one. Until the run is finished there is a small tar
    for each unit."""

    pattern = r"samples-\d{6,}\.tar(\.idx)?|manifest\.json"

    @staticmethod
    def file(index: int) -> str:
        return f"samples-{index // SHARD_IMAGES:06d}.tar"

    def write(self, number: int, pictures: Iterable[Picture]) -> None:
        with replacing(self._part(number), self.worker) as file:
            tar = TarWriter(file)
            for picture in pictures:
                tar.add(f"{picture.index:06d}.png", encoded(picture, self.text(picture.index)))
            tar.finish()

    def finish(self, units: Iterable[Finished]) -> None:
        samples = (sample for unit in units for sample in self._samples(unit))
        shards = tuple(
            write_shard(self.out / name, group, self.worker)
            for name, group in groupby(samples, lambda sample: self.file(int(sample[0])))
        )
        Manifest(IMAGES_FORMAT, shards).save(self.out, self.worker)

    def _samples(self, unit: Finished) -> Iterator[tuple[str, dict[str, bytes]]]:
        members = read_members(self._part(unit.number))
        for (name, data), image in zip(members.items(), unit.images, strict=True):
            files = {"png": bytes(data)}
            if image.get("class") is not None:
                files["cls"] = str(image["class"]).encode()
            yield Path(name).stem, files

    def _part(self, number: int) -> Path:
        return self.parts / f"{number:06d}.tar"
