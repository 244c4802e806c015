"""Online encoding: the images of a rank become codes on its device, by frozen VQGANs.

Tokenized codes are the same in every epoch; here crops and flips may differ each time. A batch is
as code shards would give it (`data.codes.CodeBatch`), only that its codes are on the device.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from taming_dist.data.codes import CodeBatch
from taming_dist.data.online import known_columns
from taming_dist.data.reader import Batch
from taming_dist.engine.flops import Flops
from taming_dist.engine.tf32 import EXACT, TF32, use_tf32
from taming_dist.formats.code_shards import CODES, CONDITIONS
from taming_dist.models.quantizers import NO_CODE
from taming_dist.models.vqgan import VQGAN


class Encoder:
    """What makes codes of images: `vqgan`, and `condition_vqgan` where the condition has codes.

    `columns`: those that the condition reads. `precision`: fp32, which is exact, or bf16.
    """

    def __init__(
        self,
        vqgan: VQGAN,
        condition_vqgan: VQGAN | None,
        columns: Sequence[str],
        precision: str = "fp32",
    ) -> None:
        self.vqgan, self._columns, self._precision = vqgan, tuple(columns), precision
        self._models = {CODES: vqgan}
        if condition_vqgan is not None:
            self._models[CONDITIONS] = condition_vqgan
        for model in self._models.values():
            model.eval().requires_grad_(False)
        self._device, self._allowed = torch.device("cpu"), EXACT

    @property
    def reads(self) -> list[str]:
        """The columns of images that it reads."""
        return [model.config.modality.column for model in self._models.values()]

    def flops(self, size: int | None) -> int:
        """Those of the codes of an image of `size` pixels across (None: as the VQGAN learned)."""
        found = 0
        for model in self._models.values():
            config, side = model.config, size or model.config.resolution
            with torch.device("meta"):
                network = VQGAN(config)
                image = torch.empty(1, config.modality.channels, side, side)
            with Flops() as flops:
                network.encode(image)
            found += flops.forward
        return found

    def to(self, device: torch.device, allowed: TF32) -> "Encoder":
        """Bring the networks to the rank's device, where training may use TF32 as `allowed`."""
        self._device, self._allowed = device, allowed
        for model in self._models.values():
            model.to(device)
        return self

    @torch.no_grad()
    def __call__(self, batch: Batch) -> CodeBatch:
        """The codes of a batch of images, with the columns that the condition reads. The device is
        not waited for: what has no code is told by `CodeBatch.coded`."""
        columns = known_columns(batch, self._columns)
        coded = torch.ones(len(batch), dtype=torch.bool, device=self._device)
        with _exact(self._allowed), self._autocast():
            for name, model in self._models.items():
                codes = self._codes(model, batch)
                coded &= (codes != NO_CODE).flatten(1).all(1)
                columns[name] = codes.clamp(min=0)
        return CodeBatch(columns, batch.ids, coded)

    def _codes(self, model: VQGAN, batch: Batch) -> Tensor:
        modality = model.config.modality
        return model.encode(modality.tensor(modality.take(batch.columns, self._device)))

    def _autocast(self) -> torch.autocast:
        # also turns off that of a training step or a validation around it
        half = self._precision == "bf16"
        return torch.autocast(self._device.type, torch.bfloat16, enabled=half)


@contextmanager
def _exact(allowed: TF32) -> Iterator[None]:
    """fp32 is exact inside; then it is as `allowed` again."""
    if allowed == EXACT:
        yield
        return
    use_tf32(EXACT)
    try:
        yield
    finally:
        use_tf32(allowed)
