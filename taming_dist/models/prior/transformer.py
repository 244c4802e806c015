"""The second stage: a transformer that predicts an image's codes from its condition and past codes.

It is put together from a condition, an order, a scheme and a kind of block, each a registry of its
own beside this file. Source: arXiv 2012.09841, section 3.2, p(s | c) = prod_i p(s_i | s_<i, c);
parameter names and initialisation are those of the original implementation, so that its checkpoints
fit.
"""

from collections.abc import Iterable
from typing import Any, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Float32, Int64
from torch import Tensor, nn

from taming_dist.copies import to_device
from taming_dist.errors import UserError
from taming_dist.models.answers import other_answers
from taming_dist.models.choice import configs
from taming_dist.models.export import Exported
from taming_dist.models.initial import StartsAtZero, draw_normal
from taming_dist.models.prior import former_keys
from taming_dist.models.prior.blocks import BLOCKS, Around, Block, KVCache, ReadOnce
from taming_dist.models.prior.config import TransformerConfig
from taming_dist.models.prior.head import Head, Judged, ZeroHead
from taming_dist.models.prior.orders import ORDERS, Places
from taming_dist.models.prior.prefix import Part, Prefix, as_prefix
from taming_dist.models.prior.schemes import SCHEMES

INIT_STD = 0.02
Spots = Int64[Tensor, "n"] | Int64[Tensor, "b n"]  # of all images, or of each
MASK_WIDTH = 16  # the fast kernels of attention read masks of its multiples as they lie


class Transformer(Exported):
    """Blocks over [condition prefix, codes of the image in an order].

    Source: arXiv 2012.09841, section 3.2.
    """

    kind = "transformer"
    additions = {"null_emb": "model.null_prefix=true or loss.condition_dropout"}
    block_types = (Block,)
    compiled_whole = True  # a block is few operations: most of the time between them is Python's

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        config.check()
        self.config = config
        self.condition, self.order, self.scheme = config.condition, config.order, config.scheme
        self._kind, self._sizes, width = config.block_type, config.block_sizes, config.width
        kind, sizes = self._kind, self._sizes
        self.tok_emb = nn.Embedding(config.vocabulary + self.scheme.extra_tokens, width)
        self.cond_emb = _condition_embedding(config)
        self.null_emb = self.pos_emb = self.target_emb = self.level_emb = None
        if config.null_prefix:
            self.null_emb = nn.Parameter(torch.empty(self.condition.length, width))
        self._learns_places = kind.learned_positions or self.scheme.learned_positions
        positions = config.positions if self._learns_places else self.condition.length
        if self._learns_places or positions > 1:
            self.pos_emb = nn.Parameter(torch.zeros(1, positions, width))
        if self.order.target_aware:
            self.target_emb = nn.Parameter(torch.empty(config.num_tokens, width))
        if config.levels > 1 and not kind.learned_positions:
            self.level_emb = nn.Parameter(torch.empty(config.levels, width))
        self.drop = nn.Dropout(config.dropout_embedding)
        self.blocks = nn.ModuleList(kind(sizes, config.block) for _ in range(config.layers))
        self.ln_f = kind.last_norm(sizes, config.block)
        self.head = (ZeroHead if kind.zero_head else Head)(width, config.vocabulary)
        self._places = self.order.places(config.code_grid)
        self.apply(_initialise)
        for table in (self.null_emb, self.target_emb, self.level_emb):
            if table is not None:
                draw_normal(table, 0.0, INIT_STD)

    def forward(
        self,
        tokens: Int64[Tensor, "b n"],
        prefix: Prefix | Part,
        places: Places | None = None,
        targets: Int64[Tensor, "b n"] | None = None,
        hits: bool = False,
    ) -> Float[Tensor, "b n v"] | Float32[Tensor, "b n"] | Judged:
        """Return logits, those of each of the image's tokens; or with targets their negative
        log-likelihood in nats, and with `hits` beside it whether each is the likeliest code: of
        neither all logits are held at once.

        The tokens are those of the `places` of the grid, of the model's order if they are left out,
        and m + n - shift <= positions, where m >= 1 is the prefix's length and `shift` the
        scheme's. With the next index (shift 1) logits at k come from prefix and tokens[:, :k].
        Source: arXiv 2012.09841, equation 11 (the negative mean log-likelihood is `losses.tokens`).

        Raises:
            UserError: more tokens than positions.
        """
        prefix, scheme = as_prefix(prefix), self.scheme
        spots = self._spots(self.places if places is None else places)
        front, read = self._prefix_embedded(prefix), scheme.read(self.tok_emb, tokens)
        x, count = torch.cat([front, read], dim=1), prefix.length + read.shape[1]
        self._check_length(count)
        x = self.drop(self._placed(x, prefix.length, spots))
        around = self._around(front, scheme.where(spots)[..., : read.shape[1]])
        mask = scheme.mask(prefix.length, x.device)
        if mask is not None:
            around = around._replace(mask=mask[:count, :count])
        for block in self.blocks:
            x = block(x, around)
        # Positions inside the prefix predict no code, so the head skips them.
        return self.head(self._normed(x[:, prefix.length - scheme.shift :], around), targets, hits)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.tok_emb.weight.device

    @property
    def places(self) -> Int64[Tensor, "p"]:
        """The places of the grid, in the model's order and on its device."""
        if self._places.device != self.device:
            self._places = to_device(self._places, self.device)
        return self._places

    def begin(
        self, prefix: Prefix | Part, tokens: Int64[Tensor, "b t"] | None = None, once: bool = False
    ) -> tuple[Float[Tensor, "b v"], KVCache]:
        """Read the prefixes and the first tokens, if some are known, in one pass; return logits of
        the next one, and the cache that `step` extends (`once`: no step will follow).

        Raises:
            UserError: more tokens than positions.
        """
        prefix = as_prefix(prefix)
        front = self._prefix_embedded(prefix)
        cache = self._cache(front, once)
        if tokens is None:
            return self._continue(front, cache), cache
        return self._continue(torch.cat([front, self.tok_emb(tokens)], dim=1), cache), cache

    def step(self, tokens: Int64[Tensor, "b t"], cache: KVCache) -> Float[Tensor, "b v"]:
        """Read the t tokens after those in the cache; return logits of the next one.

        Raises:
            UserError: more tokens than positions.
        """
        return self._continue(self.tok_emb(tokens), cache)

    def several(self, tokens: Int64[Tensor, "b t"], cache: KVCache) -> Float[Tensor, "b u v"]:
        """Read what the scheme makes of all tokens so far at the positions after those in the
        cache, which see each other; return logits of each.

        Raises:
            UserError: more tokens than positions.
        """
        read = self.scheme.read(self.tok_emb, tokens, cache.length - cache.prefix)
        return self._continued(read, cache, all_of_them=True)

    def canonical_config(self) -> dict[str, Any]:
        """The configuration as config.json has it: what later keys say is left out where it is what
        there was before them, so that exports keep their fingerprints."""
        values = super().canonical_config()
        if self.cond_emb is None:
            del values["condition_table"]
        if self.null_emb is None:
            del values["null_prefix"]
        for part, members in (("block", configs(BLOCKS)), ("order", ORDERS), ("scheme", SCHEMES)):
            before: Any = members[former_keys.PARTS[part]]()
            if not list(other_answers(before, getattr(self.config, part))):
                del values[part]
        return former_keys.former(values)

    def _cache(self, front: Float[Tensor, "b m c"], once: bool) -> KVCache:
        """An empty cache for images with these prefixes, in the precision of their keys."""
        (batch, prefix, _), device, first = front.shape, front.device, cast(Block, self.blocks[0])
        heads, width = first.cached
        positions = self.config.positions
        rounded = 0 if once else -(-positions // MASK_WIDTH) * MASK_WIDTH
        shape = (batch, heads, rounded, width)
        dtype = front.dtype
        if torch.is_autocast_enabled(device.type):
            dtype = torch.get_autocast_dtype(device.type)
        # apart from each other: compilers would copy all layers for what is written into one
        keys, values = (
            [torch.empty(shape, device=device, dtype=dtype) for _ in self.blocks] for _ in range(2)
        )
        spots = self._spots(self.places)
        unplaced = front.new_zeros(min(positions, prefix + len(spots)), front.shape[-1])
        learned = self._placed(unplaced, prefix, spots)
        around = self._around(front, self.scheme.where(spots))
        return (ReadOnce if once else KVCache)(keys, values, learned, around, prefix)

    def _spots(self, places: Places) -> Spots:
        """Where each token belongs, from the places of the grid: its place times the number of
        levels, and its level."""
        levels = self.config.levels
        if levels == 1:
            return places
        level = torch.arange(levels, device=places.device)
        return (places.unsqueeze(-1) * levels + level).flatten(-2)

    def _continue(self, x: Float[Tensor, "b t c"], cache: KVCache) -> Float[Tensor, "b v"]:
        """Logits after the positions with the embeddings x, which follow those in the cache."""
        return self._continued(x, cache)[:, 0]

    def _continued(
        self, x: Float[Tensor, "b t c"], cache: KVCache, all_of_them: bool = False
    ) -> Float[Tensor, "b u v"]:
        """Logits at the last of those positions, or at all of them."""
        if cache.again is not None:
            x, cache.length = torch.cat([cache.again, x], dim=1), 0
        count = x.shape[1]
        seen = count < self._kind.unmasked(self.config.block)
        cache.again = x if cache.length == 0 and seen else None
        self._check_length(cache.length + count)
        around = cache.around._replace(cache=cache, mask=cache.mask())
        if around.rotation is not None:
            around = around._replace(rotation=cache.next(around.rotation, count))
        x = self.drop(x + cache.next(cache.learned, count))
        last = len(self.blocks) - 1
        for layer, block in enumerate(self.blocks):
            around = around._replace(layer=layer)
            x = block(x, around if all_of_them or layer < last else around.of_last())
        cache.advance(count)
        return self.head(self._normed(x, around))

    def _prefix_embedded(self, prefix: Prefix) -> Float[Tensor, "b m c"]:
        """The embeddings of the prefix's parts, one after the other; the null one where dropped."""
        tables: Iterable[nn.Module] = [self.tok_emb] * len(prefix.parts)
        if isinstance(self.cond_emb, nn.ModuleList):
            tables = self.cond_emb
        elif self.cond_emb is not None:
            tables = [self.cond_emb]
        parts = [table(part) for table, part in zip(tables, prefix.parts, strict=True)]
        front = torch.cat(parts, dim=1)
        if prefix.dropped is None:
            return front
        assert self.null_emb is not None, "a model without null_prefix drops no condition"
        return torch.where(prefix.dropped[:, None, None], self.null_emb.to(front.dtype), front)

    def _around(self, front: Float[Tensor, "b m c"], spots: Spots) -> Around:
        """What the blocks are told of the prefix and of tokens at these spots."""
        inside = spots.new_full((*spots.shape[:-1], front.shape[1]), -1)
        where = torch.cat([inside, spots // self.config.levels], dim=-1)
        rotation = self._kind.rotation(self._sizes, self.config.block, where)
        return Around(rotation, front.mean(1) if self._adaptive else None)

    @property
    def _adaptive(self) -> bool:
        return cast(Block, self.blocks[0]).adaptive

    def _normed(self, x: Tensor, around: Around) -> Tensor:
        """The last norm's answer."""
        return self.ln_f(x) if around.signal is None else self.ln_f(x, around.signal)

    def _check_length(self, positions: int) -> None:
        if positions > self.config.positions:
            raise UserError(
                f"block_size: {positions} tokens do not fit the model's {self.config.positions} "
                f"positions"
            )

    def _placed(
        self, x: Float[Tensor, "*b t c"], prefix: int, spots: Spots
    ) -> Float[Tensor, "*b t c"]:
        """Embeddings of the first t positions with what is learned of them added; the first
        `prefix` of all are the condition's."""
        end = x.shape[-2]
        learned = end if self._learns_places else min(end, prefix)
        if self.pos_emb is not None:
            rows = self._learned(learned, prefix, spots)
            x = x + (rows if learned == end else F.pad(rows, (0, 0, 0, end - learned)))
        if self.target_emb is not None:
            first = prefix - self.scheme.shift  # position p predicts token p - first
            wanted = self.target_emb[spots[..., : end - first]]
            x = x + F.pad(wanted, (0, 0, first, end - first - wanted.shape[-2]))
        if self.level_emb is not None:
            own = self.level_emb[spots[..., : max(0, end - prefix)] % len(self.level_emb)]
            x = x + F.pad(own, (0, 0, end - own.shape[-2], 0))
        return x

    def _learned(self, end: int, prefix: int, spots: Spots) -> Float[Tensor, "*b t c"]:
        """The learned embeddings of the first positions: in the prefix, and in an order that all
        images have, by position; in one that is drawn by spot."""
        assert self.pos_emb is not None
        table = self.pos_emb[0]
        if end <= prefix or not self.order.drawn:
            return table[:end]
        own = torch.arange(prefix, device=table.device)
        there = spots[..., : end - prefix] + prefix
        return table[torch.cat([own.expand(*there.shape[:-1], -1), there], dim=-1)]


def _condition_embedding(config: TransformerConfig) -> nn.Module | None:
    """What the condition's parts have of their own to be embedded by; None: the codes' table."""
    if config.condition_table == "shared":
        return None
    tables = [each.embedding(config.width) for each in config.condition.conditions]
    return tables[0] if len(tables) == 1 else nn.ModuleList(tables)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, StartsAtZero):
        nn.init.zeros_(module.weight)
    elif isinstance(module, nn.Linear | nn.Embedding):
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
