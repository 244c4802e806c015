"""Stage 2: the transformer on code indices. Source: arXiv 2012.09841, section 3.2, equation 11.

Only codes are read: no image and no encoder is in memory. Previews decode samples with the decoder
of the VQGAN that wrote the codes, where it is given.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from taming_dist.evaluation.tokens import TokenFigures
from taming_dist.generation.generator import generate_tokens
from taming_dist.generation.pictures import sheet, to_uint8
from taming_dist.generation.sampling import Sampling, image_uniforms
from taming_dist.losses.tokens import corrupt, token_nll
from taming_dist.models.prior.transformer import Transformer, TransformerConfig, decay_groups
from taming_dist.models.vqgan import VQGAN
from taming_dist.ranges import check_ranges, ranged
from taming_dist.stages.setup import Setup
from taming_dist.stages.trained import Trained, begin_step
from taming_dist.training.clock import Clock
from taming_dist.training.optimization import mix
from taming_dist.training.recipe import Scalars


@dataclasses.dataclass
class TokenLossConfig:
    """`pkeep`: probability that an input code is kept; else it is replaced by a random one."""

    pkeep: float = ranged(1.0, above=0, at_most=1)

    def __post_init__(self) -> None:
        check_ranges(self, "loss")


class TransformerRecipe:
    """Trains p(s | c) by next-index prediction."""

    def __init__(
        self,
        model: TransformerConfig,
        loss: TokenLossConfig,
        setup: Setup,
        vqgan: VQGAN | None = None,
        initial: Mapping[str, Tensor] | None = None,
    ) -> None:
        """`vqgan` decodes previews, without it there are none; its encoder is never used.
        `initial`: the weights to start from, instead of random ones."""
        self.setup, self.world = setup, setup.world
        self.loss, self.vqgan = loss, vqgan
        groups = partial(decay_groups, weight_decay=setup.optim.weight_decay)
        self.trained = Trained(Transformer, model, setup, initial, groups)
        self.transformer = self.trained.engine
        self.engines = {"transformer": self.transformer}

    def train_step(self, micro_batches: Iterable[Any], clock: Clock) -> Iterator[Scalars]:
        """One optimizer step: -log p(s | c), the mean over codes, in nats."""
        begin_step(self.engines, self.setup, clock)
        noise, size = self._noise(clock), self.setup.micro_batch
        for index, batch in enumerate(micro_batches):
            tokens, prefix = self._tokens(batch)
            inputs = tokens
            if noise is not None:
                rows = slice(index * size, (index + 1) * size)
                inputs = corrupt(tokens, self.loss.pkeep, *(part[rows] for part in noise))
            loss = token_nll(self.transformer(inputs, prefix), tokens)
            self.transformer.backward(loss)
            self.transformer.step()
            yield {"loss": loss}

    def _noise(self, clock: Clock) -> tuple[Tensor, Tensor] | None:
        """Chances and random codes [b * accumulation, n] of this rank for one optimizer step.

        They are drawn for the whole global batch: they do not depend on the number of ranks.
        """
        if self.loss.pkeep == 1:
            return None
        config = self.transformer.module.config
        randomness = torch.Generator().manual_seed(mix(self.setup.seed, clock.images))
        shape = (clock.global_batch, config.num_tokens)
        chance = torch.rand(shape, generator=randomness)
        codes = torch.randint(config.vocabulary, shape, generator=randomness)
        mine = slice(self.world.rank, None, self.world.world_size)
        return chance[mine].to(self.world.device), codes[mine].to(self.world.device)

    def _tokens(self, batch: Any) -> tuple[Tensor, Tensor]:
        """Codes [b,n] and condition prefix [b,m] on the device."""
        condition = self.transformer.module.condition
        given = getattr(batch, condition.column)
        prefix = condition.tokens(len(batch.codes), given, self.world.device)
        return batch.codes.flatten(1).to(self.world.device), prefix

    def window_metrics(self) -> dict[str, float]:
        return self.transformer.window_metrics()

    def validate(self, batches: Iterable[tuple[Any, bool]]) -> dict[str, float]:
        def measure(model: Transformer, batch: Any) -> tuple[Tensor, ...]:
            tokens, prefix = self._tokens(batch)
            return model(tokens, prefix), tokens

        figures = TokenFigures(self.transformer.module.config.vocabulary)
        return self.trained.validate(batches, figures, measure)

    @torch.no_grad()
    def preview(self, batch: Any) -> Tensor | None:
        """Samples under the batch's conditions, from the same random numbers every time."""
        if self.vqgan is None:
            return None
        device = self.world.device
        _, prefix = self._tokens(batch)
        grid = tuple(self.transformer.module.config.grid)
        uniforms = image_uniforms(self.setup.seed, range(len(prefix)), math.prod(grid)).to(device)
        # by all ranks: ZeRO 3 needs them all
        with self.transformer.evaluated() as network, self.transformer.root_weights():
            tokens = generate_tokens(network, prefix, Sampling(), uniforms)
        if not self.world.is_first:
            return None
        decoder = self.vqgan.to(device)
        images = decoder.decode_codes(tokens.unflatten(1, grid))
        pictures = decoder.config.modality.picture(images)
        return sheet(to_uint8(pictures), columns=len(pictures))

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass

    def export(self, folder: Path) -> None:
        self.trained.export(folder)
