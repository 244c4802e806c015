"""Entry point: write images that a trained transformer and its VQGAN make.

python -m taming_dist.sample transformer=EXPORT vqgan=EXPORT out=DIR n=64 seed=0 class_id=3

<out> gets 000000.png and so on, grid.png, and last samples.json with what made them; see
docs/sampling.md. Source: arXiv 2012.09841, section 4.
"""

from pathlib import Path
from typing import Any

from torch import Tensor

from taming_dist.config import hydra_entry
from taming_dist.engine.world import choose_device
from taming_dist.formats.files import writing
from taming_dist.generation.generator import Generator
from taming_dist.models.prior.transformer import Transformer
from taming_dist.models.vqgan import VQGAN
from taming_dist.sampling.config import SampleConfig
from taming_dist.sampling.folder import prepare_folder, write_grid, write_pictures, write_record
from taming_dist.sampling.plan import plan_of
from taming_dist.sampling.progress import Progress
from taming_dist.sampling.units import units_of


def main(config: SampleConfig) -> None:
    """Sample, and write the images into `config.out`.

    Raises:
        UserError: exports, settings or a folder that cannot be used; nothing is written then.
    """
    generator = load_generator(config)
    plan = plan_of(config, generator)
    out = Path(config.out)
    count = plan.request.count
    prepare_folder(out, count)
    progress = Progress(count)
    images: list[dict[str, Any]] = []
    shown: list[Tensor] = []
    with writing(out, "out="):
        for unit in units_of(count, config.batch, out):
            for written in write_pictures(plan.pictures(unit), out, shown):
                images.append(written)
                progress.at(len(images))
        write_grid(shown, plan.beside, plan.period, out)
        write_record(config, generator, images, out)
    print(f"{count} images, and all at a glance: {out / 'grid.png'}")


def load_generator(config: SampleConfig) -> Generator:
    """Return the generator of the two exports, on the GPU if there is one."""
    device = choose_device()
    transformer = Transformer.from_pretrained(config.transformer)
    vqgan = VQGAN.from_pretrained(config.vqgan)
    return Generator(transformer.to(device), vqgan.to(device))


if __name__ == "__main__":
    hydra_entry("sample", SampleConfig, main)
