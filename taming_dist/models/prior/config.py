"""What a transformer is made of: its sizes, and a member of each registry of its parts."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from omegaconf import MISSING

from taming_dist.errors import UserError
from taming_dist.models.choice import chosen, configs
from taming_dist.models.export import ModelConfig
from taming_dist.models.prior import former_keys
from taming_dist.models.prior.blocks import BLOCKS, Block, BlockSizes
from taming_dist.models.prior.conditions import CONDITIONS, Codes, agreed
from taming_dist.models.prior.orders import ORDERS, grid_of, is_code_shape, levels_of
from taming_dist.models.prior.schemes import SCHEMES
from taming_dist.ranges import check_choice, check_ranges, marked, ranged

CONDITION_TABLES = ("own", "shared")


@dataclass
class TransformerConfig(ModelConfig):
    """Sizes of a transformer and the tokenizer that it was trained on; defaults are the paper's.

    `vocabulary` is the number of codes, `grid` the shape of an image's: a grid [i, j], several
    [levels, i, j], or a sequence [n]. `block_size` is the number of positions (0: as many as prefix
    and grid need). `condition`, `block`, `order` and
    `scheme` are members of CONDITIONS, BLOCKS, ORDERS and SCHEMES.

    `condition_table`: `own` gives the condition's tokens a table of their own, of any size;
    `shared` takes the rows of the codes for them too, as the original does: class 3 is code 3. It
    is what exports and runs without the key have, and a start token (`none`) has no other.

    `null_prefix`: there is a prefix that stands for no condition, which guidance needs; training
    with `loss.condition_dropout` sets it.
    """

    vocabulary: int = ranged(at_least=0, from_data=True)
    grid: list[int] = ranged(at_least=1, empty=True, from_data=True)
    block_size: int = ranged(0, at_least=0, compared=False)
    layers: int = ranged(24, at_least=1, compared=False)
    heads: int = ranged(16, at_least=1)
    width: int = ranged(1024, at_least=1, compared=False)
    dropout_embedding: float = ranged(0.0, at_least=0, below=1, compared=False)
    dropout_attention: float = ranged(0.0, at_least=0, below=1, compared=False)
    dropout_residual: float = ranged(0.0, at_least=0, below=1, compared=False)
    condition: Any = MISSING
    block: Any = MISSING
    order: Any = MISSING
    scheme: Any = MISSING
    vqgan_fingerprint: str = marked("", compared=False)
    condition_table: str = "shared"
    null_prefix: bool = marked(False, compared=False)

    def __post_init__(self) -> None:
        check_ranges(self, "model")
        self.condition = chosen(CONDITIONS, self.condition, "model/condition")
        self.block = chosen(configs(BLOCKS), self.block, "model/block")
        self.order = chosen(ORDERS, self.order, "model/order")
        self.scheme = chosen(SCHEMES, self.scheme, "model/scheme")
        check_choice("model.condition_table", self.condition_table, CONDITION_TABLES)
        if not self.condition.has_table:
            self.condition_table = "shared"
        if any(each.features for each in self.condition.conditions):
            self.condition_table = "own"

    @staticmethod
    def present(values: Mapping[str, Any]) -> dict[str, Any]:
        """Return plain values that an export or run of any age has, under the present keys."""
        return former_keys.present(values)

    @property
    def num_tokens(self) -> int:
        """Return n, the number of codes of one image."""
        return prod(self.grid)

    @property
    def code_shape(self) -> tuple[int, ...]:
        """Return the shape of an image's codes as a tuple."""
        return tuple(self.grid)

    @property
    def code_grid(self) -> tuple[int, int]:
        """Return the grid [i, j] of the places of codes; that of a sequence is one row."""
        return grid_of(self.grid)

    @property
    def levels(self) -> int:
        """Return how many codes there are at a place."""
        return levels_of(self.grid)

    @property
    def positions(self) -> int:
        """Return the most positions there are, in tokens of prefix and image together."""
        return self.block_size or self._positions_needed()

    @property
    def block_type(self) -> type[Block]:
        """Return the class of the blocks."""
        return BLOCKS[self.block.name][1]

    @property
    def block_sizes(self) -> BlockSizes:
        """Return what each block is told."""
        return BlockSizes(
            self.width,
            self.heads,
            self.dropout_attention,
            self.dropout_residual,
            self.scheme.causal,
            self.positions,
            self.condition.length,
            self.scheme.image_grid(self.code_grid),
        )

    def fitted(self, codes: Codes, spec: Any) -> "TransformerConfig":
        """Return it with what code shards say; `spec` names them in errors.

        Raises:
            UserError: the two differ, or the sizes do not fit together.
        """
        found = {
            "vocabulary": codes.vocabulary,
            "grid": list(codes.grid),
            "vqgan_fingerprint": codes.tokenizer_fingerprint,
        }
        condition = self.condition.fitted(codes, spec)
        complete = replace(agreed(self, found, "model", spec), condition=condition)
        complete.check()
        return complete

    def check(self) -> None:
        """Raise a UserError, naming the key, if the sizes do not fit together."""
        if not is_code_shape(self.grid):
            raise UserError(
                f"model.grid={list(self.grid)}: give the code grid [height, width], or with "
                f"several codes at a place [levels, height, width]"
            )
        if self.width % self.heads:
            raise UserError(f"model.width: {self.width} does not divide by heads={self.heads}")
        self.condition.check()
        self.block_type.check(self.block_sizes, self.block)
        unmasked = self.block_type.unmasked(self.block)
        fault = self.scheme.fault(self.grid, self.order.name, unmasked)
        if fault is not None:
            raise UserError(fault)
        if self.null_prefix and not self.condition.can_drop:
            raise UserError(
                f"loss.condition_dropout: there is nothing to drop of model/condition="
                f"{self.condition.name}, leave it at 0"
            )
        tokens = self.condition.vocabulary
        if self.condition_table == "shared" and tokens > self.vocabulary:
            raise UserError(
                f"model/condition={self.condition.name}: its {tokens} tokens do not fit vocabulary="
                f"{self.vocabulary}, whose table they share: use model.condition_table=own, or a "
                f"codebook of at least that many"
            )
        if self.positions < self._positions_needed():
            raise UserError(
                f"model.block_size: {self.block_size} is too short for grid={list(self.grid)}, "
                f"give 0 or at least {self._positions_needed()}"
            )

    def _positions_needed(self) -> int:
        # the last token of a fixed order is not read; of a drawn one, it may be any
        unread = 0 if self.order.drawn else self.scheme.shift
        return self.condition.length + self.num_tokens - unread
