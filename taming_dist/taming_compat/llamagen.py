"""LlamaGen's tokenizers (arXiv 2406.06525): the original's networks under other names, and entries
on the unit sphere."""

import re
from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor

from taming_dist.models.export import assemble
from taming_dist.models.quantizers import VectorQuantizerConfig
from taming_dist.models.vqgan import VQGAN
from taming_dist.taming_compat.first_stage import check_layout, children, infer

MARK = "encoder.conv_blocks."  # how names start that only this layout has

MIDDLE = ("block_1", "attn_1", "block_2")
NUMBERED = re.compile(r"(encoder|decoder)\.(conv_blocks|mid)\.(\d+)\.(.*)")


def import_llamagen(tensors: Mapping[str, Tensor], resolution: int | None = None) -> VQGAN:
    """A VQGAN from the tensors of LlamaGen's `VQModel`; `resolution` as in `import_vqgan`.

    Raises:
        UserError: tensors are missing or unknown, or do not fit each other.
    """
    last = children(tensors, "decoder.conv_blocks.") - 1
    state = {our_name(name, last): tensor for name, tensor in tensors.items()}
    config = infer(state, "vector", {}, resolution)
    codes, dim = config.quantizer.codes, config.quantizer.dim
    quantizer = VectorQuantizerConfig(codes=codes, dim=dim, normalized=True)
    config = replace(config, quantizer=quantizer)
    check_layout(config, state)
    return assemble(VQGAN, config, state)


def our_name(name: str, last: int) -> str:
    """What a tensor is called here; `last`: the number of the last level. Theirs are numbered in
    the order in which they run, also those of the decoder, and are `conv_blocks.N.res.M`."""
    found = NUMBERED.fullmatch(name)
    if found is None:
        return name
    network, part, number, rest = found[1], found[2], int(found[3]), found[4]
    if part == "mid":
        return f"{network}.mid.{MIDDLE[number]}.{rest}" if number < len(MIDDLE) else name
    level = f"down.{number}" if network == "encoder" else f"up.{last - number}"
    return f"{network}.{level}.{re.sub(r'^res[.]', 'block.', rest)}"
