"""Blocks of the transformer, by the name that `model/block=` has.

A kind of block is a class with a config class, and one line in BLOCKS.
"""

from typing import Any

from taming_dist.models.prior.blocks.cache import Around, KVCache, ReadOnce, StaticCache
from taming_dist.models.prior.blocks.gpt import GPTBlock, GPTBlockConfig
from taming_dist.models.prior.blocks.interface import Block, BlockSizes
from taming_dist.models.prior.blocks.llama import LlamaBlock, LlamaBlockConfig
from taming_dist.models.prior.blocks.rar import RARBlock, RARBlockConfig

__all__ = [
    "BLOCKS",
    "Around",
    "Block",
    "BlockSizes",
    "GPTBlock",
    "GPTBlockConfig",
    "KVCache",
    "LlamaBlock",
    "LlamaBlockConfig",
    "RARBlock",
    "RARBlockConfig",
    "ReadOnce",
    "StaticCache",
]

# name in conf/model/block -> its config and its block; the first is the default
BLOCKS: dict[str, tuple[Any, type[Block]]] = {
    "gpt": (GPTBlockConfig, GPTBlock),
    "llama": (LlamaBlockConfig, LlamaBlock),
    "rar": (RARBlockConfig, RARBlock),
}
