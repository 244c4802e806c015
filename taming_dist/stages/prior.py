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

from taming_dist.data.codes import CodeDataset, CodeReader, CodesConfig
from taming_dist.errors import UserError
from taming_dist.evaluation.tokens import TokenFigures
from taming_dist.generation.generator import generate_tokens
from taming_dist.generation.pictures import sheet, to_uint8
from taming_dist.generation.sampling import Sampling, image_uniforms
from taming_dist.losses.tokens import corrupt, token_nll
from taming_dist.models.prior.transformer import Transformer, TransformerConfig, decay_groups
from taming_dist.models.vqgan import VQGAN
from taming_dist.ranges import check_ranges, ranged
from taming_dist.stages.interface import Config, LossConfig, Opened, Stage, Start, part
from taming_dist.stages.opening import initial_weights, join
from taming_dist.stages.setup import Setup
from taming_dist.stages.trained import Trained, begin_step
from taming_dist.training.clock import Clock
from taming_dist.training.optimization import mix
from taming_dist.training.recipe import Scalars


@dataclasses.dataclass
class TokenLossConfig(LossConfig):
    """`pkeep`: probability that an input code is kept; else it is replaced by a random one."""

    pkeep: float = ranged(1.0, above=0, at_most=1)

    def __post_init__(self) -> None:
        check_ranges(self, "loss")


@dataclasses.dataclass(frozen=True)
class OpenedCodes(Opened):
    """With the model's configuration as the codes complete it, the VQGAN that decodes previews
    (None: there are none), and the weights to start from (None: random ones)."""

    model: TransformerConfig
    decoder: VQGAN | None = None
    initial: Mapping[str, Tensor] | None = None


class PriorStage(Stage[OpenedCodes]):
    """Codes. Vocabulary, grid and tokenizer of the model are those of the code shards, and have to
    agree where the configuration names them."""

    model = TransformerConfig
    loss = TokenLossConfig
    data = CodesConfig
    schemas = {
        "model": {"transformer": TransformerConfig},
        "loss": {"tokens": TokenLossConfig},
        "data": {"codes": CodesConfig},
    }

    def open_data(self, config: Config, start: Start) -> OpenedCodes:
        data, batch, here = part(config.data, CodesConfig), start.batch, start.here
        train_set = open_codes(data, "train")
        model = fitted(part(config.model, TransformerConfig), train_set, data.train)
        initial = initial_weights(start.init, Transformer, model)
        val_set = open_codes(data, "val")
        fitted(model, val_set, data.val)
        if val_set.class_names != train_set.class_names:
            raise UserError(
                f"data.train and data.val name other classes, {train_set.class_names} and "
                f"{val_set.class_names}: make both sets of shards from the same class folders"
            )
        train = CodeReader(
            train_set,
            seed=config.run.seed,
            lanes=data.lanes,
            block=data.block,
            rank=here.rank,
            world_size=here.world_size,
            micro_batch=batch.micro_batch,
        )
        val = CodeReader(
            val_set,
            rank=here.rank,
            world_size=here.world_size,
            micro_batch=batch.micro_batch,
            most_evaluated=config.train.validate_images,
        )
        shown = CodeReader(val_set, micro_batch=config.train.preview_images)
        decoder = open_decoder(data, train_set)
        return OpenedCodes(join(train, val, shown, batch), model, decoder, initial)

    def recipe(self, config: Config, opened: OpenedCodes, setup: Setup) -> "TransformerRecipe":
        loss = part(config.loss, TokenLossConfig)
        return TransformerRecipe(opened.model, loss, setup, opened.decoder, opened.initial)


def open_decoder(data: CodesConfig, codes: CodeDataset) -> VQGAN | None:
    """The VQGAN of data.vqgan, without its encoder; None where none is named.

    Raises:
        UserError: it is not the one that wrote the codes.
    """
    if not data.vqgan:
        return None
    vqgan = VQGAN.from_pretrained(data.vqgan)
    if vqgan.fingerprint != codes.tokenizer_fingerprint:
        raise UserError(
            f"data.vqgan={data.vqgan} has the fingerprint {vqgan.fingerprint}, but the codes of "
            f"{data.train} were written by {codes.tokenizer_fingerprint}: tokenize again, or name "
            f"that VQGAN"
        )
    del vqgan.encoder
    return vqgan


def open_codes(data: CodesConfig, name: str) -> CodeDataset:
    """The code shards of data.train or data.val."""
    try:
        return CodeDataset.open(getattr(data, name), data.in_memory)
    except UserError as error:
        raise UserError(
            f"data.{name}: {error} (code shards come from: python tools/tokenize_dataset.py)"
        ) from error


def fitted(model: TransformerConfig, codes: CodeDataset, spec: str) -> TransformerConfig:
    """The model's configuration with what the codes say; UserError where the two differ."""
    found: dict[str, Any] = {
        "vocabulary": codes.vocabulary,
        "grid": list(codes.grid),
        "vqgan_fingerprint": codes.tokenizer_fingerprint,
    }
    if model.condition == "codes":
        if codes.condition is None:
            raise UserError(
                f"model.condition=codes, but {spec} has codes of images only: make "
                f"them with tools/tokenize_dataset.py --condition-model EXPORT"
            )
        found["condition_vocabulary"] = codes.condition["vocab"]
        found["condition_grid"] = list(codes.condition["grid"])
        found["condition_fingerprint"] = codes.condition["fingerprint"]
    for name, value in found.items():
        asked = getattr(model, name)
        if asked and asked != value:
            raise UserError(
                f"model.{name} is {asked}, but the codes of {spec} have {value}: use the codes of "
                f"that tokenizer, or another run"
            )
    if model.condition == "class":
        if not codes.classes_present:
            raise UserError(
                f"model.condition=class, but the codes of {spec} have no classes: make image "
                f"shards with labels (tools/make_shards.py --labels folders) and tokenize them"
            )
        codes.check_classes()
        found["classes"] = model.classes or max(codes.num_classes, len(codes.class_names or ()))
        if codes.num_classes > found["classes"]:
            raise UserError(
                f"model.classes={model.classes}, but {spec} has classes up to "
                f"{codes.num_classes - 1}"
            )
    complete = dataclasses.replace(model, **found)
    complete.check()
    return complete


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
