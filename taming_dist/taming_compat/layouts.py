"""Layouts of first stages: the original's, and those of tokenizers that others have published."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from taming_dist.errors import UserError
from taming_dist.models.vqgan import VQGAN
from taming_dist.taming_compat import llamagen, maskgit
from taming_dist.taming_compat.first_stage import import_vqgan


class Layout(NamedTuple):
    """A layout that is not the original's: how names start that only it has, and what makes a VQGAN
    of its tensors and the resolution (pixels), if one is given."""

    mark: str
    imported: Callable[[Mapping[str, Tensor], int | None], VQGAN]


# by the name of the project
LAYOUTS = {
    "LlamaGen": Layout(llamagen.MARK, llamagen.import_llamagen),
    "MaskGIT": Layout(maskgit.MARK, maskgit.import_maskgit),
}


def import_first_stage(
    tensors: Mapping[str, Tensor],
    description: Mapping[str, Any],
    resolution: int | None = None,
    label_map: bool = False,
) -> VQGAN:
    """A VQGAN from tensors of any layout that is known, as `import_vqgan`.

    Raises:
        UserError: as there, or the original's YAML file is given for a layout that is not its.
    """
    for project, layout in LAYOUTS.items():
        if any(name.startswith(layout.mark) for name in tensors):
            if description:
                raise UserError(f"the checkpoint is of {project}, all is in it: omit --config")
            return layout.imported(tensors, resolution)
    return import_vqgan(tensors, description, resolution, label_map)
