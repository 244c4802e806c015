"""Time in a run is the number of images seen; steps, schedules and seeds derive from it.

Steps are those of the present global batch: a run that is resumed with another one counts as if it
had always had it, so that what is given in steps (its length, cadences, the start of the GAN) means
`steps * global_batch` images. Whatever outlives a start (checkpoints, metrics, previews) is named
and ordered by images.
"""

import dataclasses


@dataclasses.dataclass
class Clock:
    """`images` seen so far, over all ranks; `global_batch` images make an optimizer step."""

    global_batch: int
    total_steps: int
    images: int = 0

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.images // self.global_batch

    @property
    def total_images(self) -> int:
        """Images at the end of the run."""
        return self.total_steps * self.global_batch

    @property
    def finished(self) -> bool:
        return self.step >= self.total_steps

    def tick(self) -> None:
        """One optimizer step is done."""
        self.images += self.global_batch

    def due(self, every_steps: int) -> bool:
        """Whether something done every so many steps (0: never) is due after the present step.

        That is wherever the images seen are a multiple of `every_steps * global_batch`.
        """
        return every_steps > 0 and self.step % every_steps == 0
