"""Entry point: write images that a trained transformer and its VQGAN make.

python -m taming_dist.sample transformer=EXPORT vqgan=EXPORT out=DIR n=64 seed=0 class_id=3

<out> gets 000000.png and so on, grid.png, and last samples.json with what made them. Also under
torchrun and srun; the same command continues what was stopped. See docs/sampling.md. Source: arXiv
2012.09841, section 4.
"""

import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from taming_dist.config import hydra_entry
from taming_dist.engine.outcome import write_outcome
from taming_dist.engine.stopping import Stopped, stoppable
from taming_dist.engine.workers import Worker, environment_worker
from taming_dist.engine.world import choose_device
from taming_dist.errors import UserError
from taming_dist.generation.generator import Generator
from taming_dist.lineage import codes, export, record, samples
from taming_dist.models.prior.transformer import Transformer
from taming_dist.models.vqgan import VQGAN
from taming_dist.sampling.again import again, check_same, read_recipe
from taming_dist.sampling.config import SampleConfig
from taming_dist.sampling.plan import plan_of
from taming_dist.sampling.recipe import Recipe, recipe_of, use_threads
from taming_dist.sampling.work import complete
from taming_dist.training.artifacts import Describe


def main(config: SampleConfig) -> None:
    """Sample, and write the images into `config.out`, unless this process is asked to stop.

    Raises:
        UserError: exports, settings or a folder that cannot be used; nothing is written then.
    """
    worker, log = environment_worker(), None
    with stoppable():
        try:
            log, last = sample(config, worker)
        except Stopped as stopped:  # while models were loaded; later `complete` sees to it
            last = f"stopped by {stopped}: nothing new was made, and the same command continues"
            if worker.rank == 0:
                write_outcome(0, 0, finished=False, reason=f"stopped by {stopped}")
    if worker.number == 0:
        print(last, flush=True)
        if log is not None:
            log()


def sample(config: SampleConfig, worker: Worker) -> tuple[Callable[[], None] | None, str]:
    """Do so; gives what tells W&B of it, None of what is not complete, and what to say at the
    end."""
    source = config.from_
    asked = read_recipe(source) if source else None
    if asked is not None:
        config = again(config, asked)
        use_threads(asked)
    generator = load_generator(config, worker.local_rank)
    plan = plan_of(config, generator)
    recipe = recipe_of(config, plan, None if asked is None else asked.image)
    same = "" if asked is None else check_same(recipe, asked, source)
    if worker.number == 0:
        for note in filter(None, (same, *plan.notes)):
            print(note, file=sys.stderr)
    out = Path(config.out)
    is_complete, last = complete(out, plan, recipe, worker)
    return partial(tell, config, out, recipe) if is_complete else None, last


def tell(config: SampleConfig, out: Path, recipe: Recipe) -> None:
    """Tell W&B of a finished run, if it is asked for."""
    exports = (config.transformer, config.vqgan, config.condition_vqgan)
    read: list[Describe] = [partial(export, name) for name in exports if name]
    if config.condition is not None:
        read.append(partial(codes, config.condition))
    figures = {"sample/images": recipe.settings["n"]}
    record(config.log, out, "sample", recipe.settings, read, partial(samples, out), figures)


def load_generator(config: SampleConfig, local_rank: int = 0) -> Generator:
    """Return the generator of the two exports, on the GPU of this rank if there is one.

    Raises:
        UserError: an export is not given, or cannot be loaded.
    """
    missing = [f"{name}=..." for name in ("transformer", "vqgan") if not getattr(config, name)]
    if missing:
        raise UserError(f"an export is missing: give {' '.join(missing)}")
    device = choose_device(local_rank)
    transformer = Transformer.from_pretrained(config.transformer)
    vqgan = VQGAN.from_pretrained(config.vqgan)
    return Generator(transformer.to(device), vqgan.to(device), config.precision, config.compile)


if __name__ == "__main__":
    # `from` is a word of Python, which no field of a dataclass can be called
    sys.argv[1:] = [re.sub(r"^from=", "from_=", word) for word in sys.argv[1:]]
    hydra_entry("sample", SampleConfig, main)
