"""The second stage: a GPT that predicts an image's next code from its condition and past codes.

Source: arXiv 2012.09841, section 3.2, p(s | c) = prod_i p(s_i | s_<i, c); parameter names and
initialisation are those of the original implementation, so that its checkpoints fit.
"""

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taming_dist.errors import UserError
from taming_dist.models.export import Exported, ModelConfig
from taming_dist.models.initial import draw_normal
from taming_dist.models.prior.conditions import Condition, build_condition
from taming_dist.ranges import check_ranges, ranged

INIT_STD = 0.02
CONDITION_TABLES = ("own", "shared")


@dataclass
class TransformerConfig(ModelConfig):
    """Sizes of a transformer and the tokenizer that it was trained on; defaults are the paper's.

    `vocabulary` is the number of codes, `grid` the code grid [i, j] of one image, `block_size` the
    number of positions (0: as many as prefix and grid need), `condition` is `class`, `codes` (of a
    second VQGAN, with the `condition_...` of its own) or `none`.

    `condition_table`: `own` gives the condition's tokens a table of their own, of any size;
    `shared` takes the rows of the codes for them too, as the original does: class 3 is code 3. It
    is what exports and runs without the key have, and a start token (`none`) has no other.
    """

    vocabulary: int = ranged(at_least=0)
    grid: list[int] = ranged(at_least=1, length=2, empty=True)
    block_size: int = ranged(0, at_least=0)
    layers: int = ranged(24, at_least=1)
    heads: int = ranged(16, at_least=1)
    width: int = ranged(1024, at_least=1)
    dropout_embedding: float = ranged(0.0, at_least=0, below=1)
    dropout_attention: float = ranged(0.0, at_least=0, below=1)
    dropout_residual: float = ranged(0.0, at_least=0, below=1)
    condition: str = "none"
    classes: int = ranged(0, at_least=0)
    vqgan_fingerprint: str = ""
    condition_vocabulary: int = ranged(0, at_least=0)
    condition_grid: list[int] = ranged([], at_least=1, length=2, empty=True)
    condition_fingerprint: str = ""
    condition_table: str = "shared"

    def __post_init__(self) -> None:
        check_ranges(self, "model")
        if self.condition_table not in CONDITION_TABLES:
            raise UserError(f"model.condition_table={self.condition_table}: use own or shared")
        if self.condition == "none":
            self.condition_table = "shared"

    @property
    def num_tokens(self) -> int:
        """Return n = i * j, the number of codes of one image."""
        return prod(self.grid)

    @property
    def positions(self) -> int:
        """Return the length of the position table, in tokens of prefix and image together."""
        return self.block_size or self._positions_needed()

    def build_condition(self) -> Condition:
        """Return the condition that these settings describe."""
        return build_condition(
            self.condition, self.classes, self.condition_grid, self.condition_vocabulary
        )

    def check(self) -> None:
        """Raise a UserError, naming the key, if the sizes do not fit together."""
        if not self.grid:
            raise UserError("model.grid=[]: give the code grid [height, width]")
        if self.width % self.heads:
            raise UserError(f"model.width: {self.width} does not divide by heads={self.heads}")
        condition = self.build_condition()
        if self.condition_table == "shared" and condition.vocabulary > self.vocabulary:
            key = "model.classes" if self.condition == "class" else "model.condition_vocabulary"
            raise UserError(
                f"{key}: {condition.vocabulary} condition tokens do not fit vocabulary="
                f"{self.vocabulary}, whose table they share: use model.condition_table=own, or a "
                f"codebook of at least that many"
            )
        if self.positions < self._positions_needed():
            raise UserError(
                f"model.block_size: {self.block_size} is too short for grid={list(self.grid)}, "
                f"give 0 or at least {self._positions_needed()}"
            )

    def _positions_needed(self) -> int:
        # The last code is predicted but never read, hence one position less than tokens.
        return self.build_condition().length + self.num_tokens - 1


class KVCache:
    """Keys and values of the positions read so far, in memory that is taken once.

    `keys` and `values` are [layers, b, heads, positions, width / heads]; `length` positions count.
    """

    def __init__(
        self, config: TransformerConfig, batch: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        head_width = config.width // config.heads
        shape = (config.layers, batch, config.heads, config.positions, head_width)
        self.keys = torch.empty(shape, device=device, dtype=dtype)
        self.values = torch.empty(shape, device=device, dtype=dtype)
        self.length = 0

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Write one layer's keys and values [b, heads, t, d] after `length`; return all so far."""
        end = self.length + key.shape[2]
        self.keys[layer, :, :, self.length : end] = key
        self.values[layer, :, :, self.length : end] = value
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


class Attention(nn.Module):
    """Causal multi-head self-attention."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.dropout = config.dropout_attention
        self.key = nn.Linear(config.width, config.width)
        self.query = nn.Linear(config.width, config.width)
        self.value = nn.Linear(config.width, config.width)
        self.proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor, cache: KVCache | None = None, layer: int = 0) -> Tensor:
        """Map [b, t, width] to the same shape; with a cache, x continues the cached positions."""
        query, key, value = (
            linear(x).unflatten(2, (self.heads, -1)).transpose(1, 2)
            for linear in (self.query, self.key, self.value)
        )
        if cache is not None:
            key, value = cache.extend(layer, key, value)
        # A single position may see everything before it: only a longer piece needs the mask.
        out = F.scaled_dot_product_attention(
            query,
            key,
            value,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=query.shape[2] > 1,
        )
        return self.proj(out.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm residual block: attention, then a perceptron of four times the width."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        width = config.width
        self.ln1 = nn.LayerNorm(width)
        self.ln2 = nn.LayerNorm(width)
        self.attn = Attention(config)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.dropout = nn.Dropout(config.dropout_residual)

    def forward(self, x: Tensor, cache: KVCache | None = None, layer: int = 0) -> Tensor:
        """Map [b, t, width] to the same shape."""
        x = x + self.dropout(self.attn(self.ln1(x), cache, layer))
        return x + self.dropout(self.mlp(self.ln2(x)))


class Transformer(Exported):
    """GPT over [condition prefix, codes of the image in raster order].

    Source: arXiv 2012.09841, section 3.2.
    """

    kind = "transformer"
    block_types = (Block,)

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        config.check()
        self.config = config
        self.condition = config.build_condition()
        self.tok_emb = nn.Embedding(config.vocabulary, config.width)
        self.cond_emb: nn.Embedding | None = None
        if config.condition_table == "own":
            self.cond_emb = nn.Embedding(self.condition.vocabulary, config.width)
        self.pos_emb = nn.Parameter(torch.zeros(1, config.positions, config.width))
        self.drop = nn.Dropout(config.dropout_embedding)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.ln_f = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, config.vocabulary, bias=False)
        self.apply(_initialise)

    def forward(self, tokens: Tensor, prefix: Tensor) -> Tensor:
        """Return logits [b, n, v]: those at k predict tokens[:, k] from prefix and tokens[:, :k].

        tokens [b, n] and prefix [b, m], the condition's tokens, are int64, 1 <= m and
        m + n - 1 <= block_size.
        Source: arXiv 2012.09841, equation 11 (the negative mean log-likelihood is `losses.tokens`).

        Raises:
            UserError: more tokens than positions.
        """
        x = self._placed(self._embedded(prefix, tokens[:, :-1]), start=0)
        for block in self.blocks:
            x = block(x)
        # Positions inside the prefix predict no code, so the head skips them.
        return self.head(self.ln_f(x[:, prefix.shape[1] - 1 :]))

    def cache(self, batch: int) -> KVCache:
        """Return an empty cache for `batch` images, on the model's device and in its precision."""
        return KVCache(self.config, batch, self.pos_emb.device, self.pos_emb.dtype)

    def step(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Read tokens [b, t] after those in the cache; return logits [b, v] of the next code.

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
        """The configuration as config.json has it; a shared table is not mentioned, so that exports
        from before there was a choice keep their fingerprints."""
        values = super().canonical_config()
        if self.cond_emb is None:
            del values["condition_table"]
        return values

    def _embedded(self, prefix: Tensor, tokens: Tensor) -> Tensor:
        """Condition tokens [b, m] and codes [b, n] -> their embeddings [b, m + n, width]."""
        if self.cond_emb is None:
            return self.tok_emb(torch.cat([prefix, tokens], dim=1))
        return torch.cat([self.cond_emb(prefix), self.tok_emb(tokens)], dim=1)

    def _placed(self, embedded: Tensor, start: int) -> Tensor:
        """Embeddings [b, t, width] with those of the positions from `start` on added."""
        end = start + embedded.shape[1]
        if end > self.config.positions:
            raise UserError(
                f"block_size: {end} tokens do not fit the model's {self.config.positions} positions"
            )
        return self.drop(embedded + self.pos_emb[:, start:end])


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
