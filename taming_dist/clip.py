"""Entry point: optimise a picture of a trained VQGAN toward a text by CLIP.

python -m taming_dist.clip vqgan=EXPORT text="a red barn in the snow" out=DIR steps=300

<out> gets steps/000050.png and so on, picture.png with its recipe inside, and picture.json. On
Ctrl-C, SIGTERM, SIGUSR1 or SIGHUP it keeps the picture as it is then. See docs/clip.md. Source:
arXiv 2204.08583.
"""

import sys
from pathlib import Path

from taming_dist.config import hydra_entry
from taming_dist.engine.stopping import Stopped, stoppable
from taming_dist.engine.world import choose_device
from taming_dist.guiding.config import ClipConfig
from taming_dist.guiding.open_clip_model import open_clip_model
from taming_dist.guiding.opening import Asked, open_optimisation, recipe_of
from taming_dist.guiding.work import Folder, run
from taming_dist.models.vqgan import VQGAN


def main(config: ClipConfig) -> None:
    """Optimise, and write into `config.out`, unless this process is asked to stop.

    Raises:
        UserError: an export, CLIP, settings or a folder that cannot be used; nothing is written
            then.
        Diverged: the loss is not finite.
    """
    with stoppable():
        try:
            last = optimise(config)
        except Stopped as stopped:
            last = f"stopped by {stopped} before the first step: nothing is written"
    print(last)


def optimise(config: ClipConfig) -> str:
    """Do so; gives what to say at the end."""
    asked = Asked.of(config)
    vqgan = VQGAN.from_pretrained(config.vqgan)
    device = choose_device(deterministic=True)  # a seed gives one picture on a GPU, too
    model = open_clip_model(config.clip_model, config.clip_weights, device)
    recipe = recipe_of(config, asked, vqgan.fingerprint, model)
    optimisation = open_optimisation(config, asked, vqgan.to(device), model)
    for note in asked.notes(model):
        print(note, file=sys.stderr)
    return run(optimisation, Folder(Path(config.out), recipe), config.every)


if __name__ == "__main__":
    hydra_entry("clip", ClipConfig, main)
