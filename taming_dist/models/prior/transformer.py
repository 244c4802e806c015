"""The second stage: a transformer that predicts an image's codes from its condition and past codes.

It is put together from a condition, an order, a scheme and a kind of block, each a registry of its
own beside this file. Source: arXiv 2012.09841, section 3.2, p(s | c) = prod_i p(s_i | s_<i, c);
parameter names and initialisation are those of the original implementation, so that its checkpoints
fit.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import torch
from jaxtyping import Float, Int64
from omegaconf import MISSING
from torch import Tensor, nn

from taming_dist.errors import UserError
from taming_dist.models.answers import other_answers
from taming_dist.models.choice import chosen
from taming_dist.models.export import Exported, ModelConfig
from taming_dist.models.initial import draw_normal
from taming_dist.models.prior import former_keys
from taming_dist.models.prior.blocks import BLOCKS, Block, BlockSizes, KVCache
from taming_dist.models.prior.conditions import CONDITIONS, Codes, agreed
from taming_dist.models.prior.orders import ORDERS
from taming_dist.models.prior.schemes import SCHEMES
from taming_dist.ranges import check_ranges, marked, ranged

INIT_STD = 0.02
CONDITION_TABLES = ("own", "shared")
BLOCK_CONFIGS = {name: config for name, (config, _) in BLOCKS.items()}


@dataclass
class TransformerConfig(ModelConfig):
    """Sizes of a transformer and the tokenizer that it was trained on; defaults are the paper's.

    `vocabulary` is the number of codes, `grid` the code grid [i, j] of one image, `block_size` the
    number of positions (0: as many as prefix and grid need). `condition`, `block`, `order` and
    `scheme` are members of CONDITIONS, BLOCKS, ORDERS and SCHEMES.

    `condition_table`: `own` gives the condition's tokens a table of their own, of any size;
    `shared` takes the rows of the codes for them too, as the original does: class 3 is code 3. It
    is what exports and runs without the key have, and a start token (`none`) has no other.
    """

    vocabulary: int = ranged(at_least=0)
    grid: list[int] = ranged(at_least=1, length=2, empty=True)
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

    def __post_init__(self) -> None:
        check_ranges(self, "model")
        self.condition = chosen(CONDITIONS, self.condition, "model/condition")
        self.block = chosen(BLOCK_CONFIGS, self.block, "model/block")
        self.order = chosen(ORDERS, self.order, "model/order")
        self.scheme = chosen(SCHEMES, self.scheme, "model/scheme")
        if self.condition_table not in CONDITION_TABLES:
            raise UserError(f"model.condition_table={self.condition_table}: use own or shared")
        if not self.condition.has_table:
            self.condition_table = "shared"

    @staticmethod
    def present(values: Mapping[str, Any]) -> dict[str, Any]:
        """Return plain values that an export or run of any age has, under the present keys."""
        return former_keys.present(values)

    @property
    def num_tokens(self) -> int:
        """Return n = i * j, the number of codes of one image."""
        return prod(self.grid)

    @property
    def code_grid(self) -> tuple[int, int]:
        """Return the grid [i, j] as a tuple."""
        return self.grid[0], self.grid[1]

    @property
    def positions(self) -> int:
        """Return the most positions there are, in tokens of prefix and image together."""
        return self.block_size or self._positions_needed()

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
            self.code_grid,
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
        if not self.grid:
            raise UserError("model.grid=[]: give the code grid [height, width]")
        if self.width % self.heads:
            raise UserError(f"model.width: {self.width} does not divide by heads={self.heads}")
        self.condition.check()
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
        return self.condition.length + self.num_tokens - self.scheme.shift


class Transformer(Exported):
    """Blocks over [condition prefix, codes of the image in an order].

    Source: arXiv 2012.09841, section 3.2.
    """

    kind = "transformer"
    block_types = (Block,)

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        config.check()
        self.config = config
        self.condition, self.order, self.scheme = config.condition, config.order, config.scheme
        block, sizes = BLOCKS[config.block.name][1], config.block_sizes
        rows = config.vocabulary + self.scheme.extra_tokens
        self.tok_emb = nn.Embedding(rows, config.width)
        self.cond_emb: nn.Embedding | None = None
        if config.condition_table == "own":
            self.cond_emb = nn.Embedding(self.condition.vocabulary, config.width)
        self.pos_emb: nn.Parameter | None = None
        if block.learned_positions:
            self.pos_emb = nn.Parameter(torch.zeros(1, config.positions, config.width))
        self.drop = nn.Dropout(config.dropout_embedding)
        self.blocks = nn.ModuleList(block(sizes, config.block) for _ in range(config.layers))
        self.ln_f = block.last_norm(sizes)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)
        self.apply(_initialise)

    def forward(
        self, tokens: Int64[Tensor, "b n"], prefix: Int64[Tensor, "b m"]
    ) -> Float[Tensor, "b n v"]:
        """Return logits, those of each of the image's tokens.

        tokens and prefix, the condition's tokens, are in the model's order, 1 <= m and
        m + n - shift <= positions, where `shift` is the scheme's. With the next index (shift 1)
        logits at k come from prefix and tokens[:, :k].
        Source: arXiv 2012.09841, equation 11 (the negative mean log-likelihood is `losses.tokens`).

        Raises:
            UserError: more tokens than positions.
        """
        shift = self.scheme.shift
        x = self._embedded(prefix, tokens[:, : tokens.shape[1] - shift])
        x = self._placed(x, start=0)
        for block in self.blocks:
            x = block(x)
        # Positions inside the prefix predict no code, so the head skips them.
        return self.head(self.ln_f(x[:, prefix.shape[1] - shift :]))

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.tok_emb.weight.device

    def cache(self, batch: int) -> KVCache:
        """Return an empty cache for `batch` images, on the model's device and in its precision."""
        weight = self.tok_emb.weight
        first: Any = self.blocks[0]
        heads, width = first.cached
        positions = self.config.positions
        return KVCache(
            len(self.blocks), batch, heads, positions, width, weight.device, weight.dtype
        )

    def step(self, tokens: Int64[Tensor, "b t"], cache: KVCache) -> Float[Tensor, "b v"]:
        """Read tokens after those in the cache; return logits of the next code.

        The first call reads the prefix (any t), later ones read one code each.

        Raises:
            UserError: more tokens than positions.
        """
        assert cache.length == 0 or tokens.shape[1] == 1, "a cache grows by one token at a time"
        table = self.tok_emb
        if self.cond_emb is not None and cache.length == 0:
            table = self.cond_emb
        x = self._placed(table(tokens), start=cache.length)
        for layer, block in enumerate(self.blocks):
            x = block(x, cache, layer)
        cache.length += tokens.shape[1]
        return self.head(self.ln_f(x[:, -1]))

    def canonical_config(self) -> dict[str, Any]:
        """The configuration as config.json has it: what later keys say is left out where it is what
        there was before them, so that exports keep their fingerprints."""
        values = super().canonical_config()
        if self.cond_emb is None:
            del values["condition_table"]
        for part, members in (("block", BLOCK_CONFIGS), ("order", ORDERS), ("scheme", SCHEMES)):
            before: Any = members[former_keys.PARTS[part]]()
            if not list(other_answers(before, getattr(self.config, part))):
                del values[part]
        return former_keys.former(values)

    def _embedded(
        self, prefix: Int64[Tensor, "b m"], tokens: Int64[Tensor, "b n"]
    ) -> Float[Tensor, "b m+n c"]:
        """The embeddings of condition tokens and codes, one after the other."""
        if self.cond_emb is None:
            return self.tok_emb(torch.cat([prefix, tokens], dim=1))
        return torch.cat([self.cond_emb(prefix), self.tok_emb(tokens)], dim=1)

    def _placed(self, embedded: Float[Tensor, "b t c"], start: int) -> Float[Tensor, "b t c"]:
        """Embeddings with those of the positions from `start` on added."""
        end = start + embedded.shape[1]
        if end > self.config.positions:
            raise UserError(
                f"block_size: {end} tokens do not fit the model's {self.config.positions} positions"
            )
        if self.pos_emb is not None:
            embedded = embedded + self.pos_emb[:, start:end]
        return self.drop(embedded)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        draw_normal(module.weight, 0.0, INIT_STD)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict]:
    """Return two AdamW groups: Linear weights decay; biases, norms and all tables do not.

    Each group is {"params": [...], "weight_decay": float}, its parameters in the model's order.
    """
    decayed = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trained if id(p) in decayed], "weight_decay": weight_decay},
        {"params": [p for p in trained if id(p) not in decayed], "weight_decay": 0.0},
    ]
