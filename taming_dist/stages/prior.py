"""Stage 2: the transformer on code indices. Source: arXiv 2012.09841, section 3.2, equation 11.

Codes are read from code shards, where no image and no encoder is in memory, or made of images on
the rank's device (`stages.online`). Previews decode samples with the decoder of the VQGAN that
wrote the codes, where it is given.
"""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from taming_dist.copies import to_device
from taming_dist.data.codes import CodeBatch, CodesConfig
from taming_dist.data.online import OnlineConfig
from taming_dist.engine.flops import Flops
from taming_dist.engine.world import World
from taming_dist.errors import UserError
from taming_dist.evaluation.tokens import token_metrics
from taming_dist.formats.code_shards import CONDITIONS as CONDITION_CODES
from taming_dist.generation.generator import Sampler, check_scales, generate_codes
from taming_dist.generation.pictures import image_grid, to_uint8
from taming_dist.generation.sampling import Sampling
from taming_dist.losses.tokens import mean_of
from taming_dist.models.choice import configs
from taming_dist.models.modalities import RGB
from taming_dist.models.prior.blocks import BLOCKS
from taming_dist.models.prior.conditions import CONDITIONS, Columns
from taming_dist.models.prior.orders import ORDERS, arrange, places_of
from taming_dist.models.prior.prefix import Prefix
from taming_dist.models.prior.schemes import SCHEMES
from taming_dist.models.prior.transformer import Transformer, TransformerConfig, decay_groups
from taming_dist.models.vqgan import VQGAN
from taming_dist.ranges import check_ranges, ranged
from taming_dist.stages.code_sources import SOURCES, CodeSource
from taming_dist.stages.context import Context
from taming_dist.stages.interface import (
    Config,
    LossConfig,
    Opened,
    Plan,
    Planned,
    Stage,
    Start,
    part,
)
from taming_dist.stages.online import Encoder
from taming_dist.stages.opening import initial_weights
from taming_dist.stages.trained import Trained, begin_step
from taming_dist.training.clock import Clock
from taming_dist.training.distances import Distances, open_distances
from taming_dist.training.export import Export
from taming_dist.training.metrics import Metrics
from taming_dist.training.optimization import mix
from taming_dist.training.recipe import Measured, Pictures, Preview, Scalars
from taming_dist.training.workload import Workload

# the draws of the order, and of which conditions are dropped, among those of the scheme
ORDER, DROPPED = "order", "dropped"
NO_DRAWS: Columns = {}


@dataclasses.dataclass
class TokenLossConfig(LossConfig):
    """The negative log-likelihood of the codes that the scheme (`model.scheme`) has predicted.

    `condition_dropout`: probability that an image's condition is left out in training, so that
    sampling can be guided. Source: arXiv 2207.12598, algorithm 1.
    """

    condition_dropout: float = ranged(0.0, at_least=0, below=1)

    def __post_init__(self) -> None:
        check_ranges(self, "loss")


@dataclasses.dataclass(frozen=True)
class OpenedCodes(Opened):
    """With the model's configuration as the codes complete it, the VQGAN that decodes previews
    (None: there are none), the weights to start from (None: random ones), the side of the images in
    pixels (None: not known), and what makes codes of the batches (None: they are codes)."""

    model: TransformerConfig
    decoder: VQGAN | None = None
    initial: Mapping[str, Tensor] | None = None
    image_size: int | None = None
    encoder: Encoder | None = None
    condition_decoder: VQGAN | None = None


class PriorStage(Stage[OpenedCodes]):
    """Codes. Vocabulary, grid and tokenizer of the model are those of the code shards, or of the
    VQGAN that encodes images, and have to agree where the configuration names them."""

    network = Transformer
    model = TransformerConfig
    loss = TokenLossConfig
    schemas = {
        "model": {"transformer": TransformerConfig},
        "model/condition": CONDITIONS,
        "model/block": configs(BLOCKS),
        "model/order": ORDERS,
        "model/scheme": SCHEMES,
        "loss": {"tokens": TokenLossConfig},
        "data": {"codes": CodesConfig, "online": OnlineConfig},
    }
    has_objective = True

    def compared(self, config: Config) -> Mapping[str, bool]:
        return {part(config.model, TransformerConfig).scheme.measure: False, "accuracy": True}

    def distances(self, config: Config, opened: OpenedCodes, world: World) -> Distances | None:
        decoder = opened.decoder
        if config.train.evaluate_every and decoder is None:
            raise UserError(
                "train.evaluate_every: FID is of pictures, and nothing decodes the samples: give "
                "data.vqgan, the export of the VQGAN that wrote the codes"
            )
        pictured = decoder is not None and isinstance(decoder.config.modality, RGB)
        if not config.train.evaluate_every or not pictured:
            return super().distances(config, opened, world)
        return open_distances(config.train, opened.data, world, size=opened.image_size)

    def plan(self, config: Config) -> Plan:
        """Sizes are those of data.train where it is there, else those of the configuration."""
        data, model, notes = config.data, model_of(config), []
        try:
            with torch.device("cpu"):  # whose VQGAN is read where images are encoded
                codes = source_of(config).codes("train")
        except UserError as error:
            notes.append(
                f"sizes are those of the configuration: no codes in data.train={data.train}"
            )
            require_sizes(model, error)
        else:
            model = model.fitted(codes, data.train)
        return Plan({"transformer": Planned(Transformer(model), averaged=True)}, notes)

    def open_data(self, config: Config, start: Start) -> OpenedCodes:
        data, source = config.data, source_of(config)
        train_set = source.codes("train")
        model = model_of(config).fitted(train_set, data.train)
        initial = initial_weights(start.init, Transformer, model)
        val_set = source.codes("val")
        model.fitted(val_set, data.val)
        if val_set.class_names != train_set.class_names:
            raise UserError(
                f"data.train and data.val name other classes, {train_set.class_names} and "
                f"{val_set.class_names}: make both sets of shards from the same class folders"
            )
        size, opened = val_set.image_size, source.open(start)
        decoders = source.decoder(), source.condition_decoder()
        if decoders[0] is not None:
            check_scales(model, decoders[0])
        return OpenedCodes(opened, model, decoders[0], initial, size, source.encoder, decoders[1])

    def workload(self, config: Config, opened: OpenedCodes) -> Workload:
        counted = prior_workload(opened.model)
        if opened.encoder is None:
            return counted
        encoder = opened.encoder.flops(opened.image_size)
        return Workload({**counted.parts, "encoder": encoder})

    def recipe(self, config: Config, opened: OpenedCodes, context: Context) -> "TransformerRecipe":
        loss = part(config.loss, TokenLossConfig)
        return TransformerRecipe(
            opened.model,
            loss,
            context,
            opened.decoder,
            opened.initial,
            opened.image_size,
            config.train.preview_guidance,
            opened.encoder,
            opened.condition_decoder,
        )


def prior_workload(model: TransformerConfig) -> Workload:
    """That of a step: prefix and codes of an image through the transformer, both ways."""
    with torch.device("meta"):
        network = Transformer(model)
        tokens = torch.zeros(1, model.num_tokens, dtype=torch.int64)
    prefix = Prefix(tuple(each.blank() for each in model.condition.conditions))
    with Flops() as flops:
        network(tokens, prefix, None, tokens)
    return Workload({"transformer": flops.total})


def model_of(config: Config) -> TransformerConfig:
    """The model with what the loss asks of it."""
    model = part(config.model, TransformerConfig)
    dropout = part(config.loss, TokenLossConfig).condition_dropout
    return dataclasses.replace(model, null_prefix=True) if dropout else model


def source_of(config: Config) -> CodeSource:
    """Where the codes come from, for the columns that the condition reads."""
    columns = part(config.model, TransformerConfig).condition.columns
    return SOURCES[type(config.data)](config, columns)


def require_sizes(model: TransformerConfig, error: UserError) -> None:
    """UserError if sizes are missing that code shards would have said, which `error` is about."""
    if not model.vocabulary or not model.grid:
        raise UserError(
            f"model.vocabulary={model.vocabulary} and model.grid={model.grid} are those of the "
            f"code shards, and {error}; without any give both, as model.vocabulary=1024 "
            f"model.grid=[16,16]"
        ) from error
    try:
        model.check()
    except UserError as missing:
        raise UserError(f"{missing}; or {error}") from missing


class TransformerRecipe:
    """Trains p(s | c) as the model's scheme has it."""

    def __init__(
        self,
        model: TransformerConfig,
        loss: TokenLossConfig,
        context: Context,
        vqgan: VQGAN | None = None,
        initial: Mapping[str, Tensor] | None = None,
        image_size: int | None = None,
        preview_guidance: float = 1.0,
        encoder: Encoder | None = None,
        condition_vqgan: VQGAN | None = None,
    ) -> None:
        """`vqgan` decodes previews, without it there are none. `initial`: the weights to start
        from, instead of random ones. `image_size`: the side of the images in pixels.
        `preview_guidance`: the scale of the guided samples in previews. `encoder`: what makes codes
        of the batches; without it they are codes. `condition_vqgan` decodes the condition's codes
        for previews; without it they are not shown."""
        self.context, self.world = context, context.world
        self.loss, self.vqgan, self.condition_vqgan = loss, vqgan, condition_vqgan
        self.image_size, self.preview_guidance = image_size, preview_guidance
        self.encoder = encoder and encoder.to(context.world.device, context.engine.allowed_tf32)
        groups = partial(decay_groups, weight_decay=context.optim.weight_decay)
        self.trained = Trained(Transformer, model, context, initial, groups)
        self.transformer = self.trained.engine
        self.engines = {"transformer": self.transformer}

    def train_step(self, micro_batches: Iterable[Any], clock: Clock) -> Iterator[Scalars]:
        """One optimizer step: -log p(s | c), the mean over codes, in nats. It is logged under the
        scheme's name for it, too, which is that of validation's."""
        begin_step(self.engines, self.context, clock)
        draws, size = self._draws(clock), self.context.micro_batch
        network, vocabulary = self.network, self.network.config.vocabulary
        for index, batch in enumerate(map(self._read, micro_batches)):
            rows = slice(index * size, (index + 1) * size)
            own = {name: part[rows] for name, part in draws.items()}
            mine = {name: to_device(part, self.world.device) for name, part in own.items()}
            places = places_of(mine[ORDER]) if ORDER in mine else network.places
            tokens = arrange(self._codes(batch), places)
            pair = network.scheme.training_pair(tokens, mine, vocabulary)
            prefix = self._prefix(batch, own)
            if DROPPED in mine:
                prefix = prefix.dropping(mine[DROPPED])
            nll = self.transformer(pair.inputs, prefix, places, pair.targets)
            loss = mean_of(_known(nll, batch), pair.weights)
            self.transformer.backward(loss)
            self.transformer.step()
            yield {"loss": loss, network.scheme.measure: loss}

    @property
    def network(self) -> Transformer:
        """The transformer under its engine."""
        return self.transformer.module

    def _draws(self, clock: Clock) -> dict[str, Tensor]:
        """The random numbers of scheme, order and condition for one optimizer step by name, a row
        for each image of this rank.

        They are drawn for the whole global batch: they do not depend on the number of ranks.
        """
        config = self.network.config
        randomness = torch.Generator().manual_seed(mix(self.context.seed, clock.images))
        shape = (clock.global_batch, config.num_tokens)
        draws = config.scheme.draw(shape, config.vocabulary, randomness)
        progress = clock.images / clock.total_images
        order = config.order.draw(clock.global_batch, config.code_grid, progress, randomness)
        if order is not None:
            draws[ORDER] = order
        if config.null_prefix:
            chance = torch.rand(clock.global_batch, generator=randomness)
            draws[DROPPED] = chance < self.loss.condition_dropout
        draws |= config.condition.draw(clock.global_batch, randomness)
        mine = slice(self.world.rank, None, self.world.world_size)
        return {name: part[mine] for name, part in draws.items()}

    def _read(self, batch: Any) -> CodeBatch:
        """A batch as codes: as it was read, or encoded now."""
        return batch if self.encoder is None else self.encoder(batch)

    def _codes(self, batch: CodeBatch) -> Tensor:
        """Codes [b,*shape] on the device."""
        return to_device(batch.codes, self.world.device)

    def _prefix(self, batch: CodeBatch, draws: Columns = NO_DRAWS) -> Prefix:
        """The prefixes of the condition on the device; their values are checked before."""
        prefix = self.network.condition.prefix(len(batch), {**batch.columns, **draws})
        return prefix.to(self.world.device)

    def depends_on_the_cut(self) -> str | None:
        return None

    def window_metrics(self) -> Metrics:
        return self.transformer.window_metrics()

    def validate(self, batches: Iterable[tuple[Any, bool]]) -> Measured:
        config = self.network.config
        metrics = token_metrics(config, self.image_size)

        def measure(model: Transformer, given: Any) -> tuple[Any, ...]:
            batch = self._read(given)
            tokens = arrange(self._codes(batch), model.places)
            pair = model.scheme.evaluation_pair(tokens, config.vocabulary)
            found = model(pair.inputs, self._prefix(batch), None, pair.targets, hits=True)
            return found._replace(nll=_known(found.nll, batch)), pair.targets, pair.weights

        return self.trained.validate(batches, metrics, measure)

    @torch.no_grad()
    def pictures(self, batches: Iterable[tuple[Any, bool]]) -> Iterator[Pictures]:
        """A sample under the condition of each image of the batches, from the same random numbers
        every time, and what the decoder makes of the image's own codes."""
        assert self.vqgan is not None, "distances are asked for where there is a decoder"
        with self.transformer.evaluated() as network, self.transformer.root_weights():
            sampler = Sampler(network, Sampling())
            for given, counts in batches:
                batch = self._read(given)
                seed, numbers = self.context.seed, batch.ids.tolist()
                codes = sampler.codes(self._prefix(batch), seed, numbers)
                if counts:
                    real = partial(self._decoded, self._codes(batch))
                    yield Pictures(self._decoded(codes), real, batch.ids)

    def _decoded(self, codes: Tensor) -> Tensor:
        """The pictures uint8 [b,3,h,w] of codes [b,*shape] of images."""
        assert self.vqgan is not None
        return to_uint8(self._pictures(self.vqgan, codes))

    @torch.no_grad()
    def preview(self, given: Any) -> Preview | None:
        """Samples under the batch's conditions, from the same random numbers every time, and guided
        ones below them where the network can be guided; above them the conditions, where they can
        be decoded, and the images that these are of."""
        if self.vqgan is None:
            return None
        batch = self._read(given)
        prefix, images = self._prefix(batch), range(len(batch))
        rows = {"validation images, decoded": self._codes(batch)}
        scale = self.preview_guidance
        samplings = {"samples under their conditions": Sampling()}
        if self.network.config.null_prefix and scale != 1:
            samplings[f"the same with guidance={scale:g}"] = Sampling(guidance=scale)
        # by all ranks: ZeRO 3 needs them all
        with self.transformer.evaluated() as network, self.transformer.root_weights():
            for name, sampling in samplings.items():
                rows[name] = generate_codes(network, prefix, sampling, self.context.seed, images)
        if not self.world.is_first:
            return None
        pictures, names = self._pictures(self.vqgan, torch.cat([*rows.values()])), tuple(rows)
        if self.condition_vqgan is not None:
            given = to_device(batch.columns[CONDITION_CODES], self.world.device)
            drawn = self._pictures(self.condition_vqgan, given)
            drawn = F.interpolate(drawn, pictures.shape[2:])
            pictures, names = torch.cat([drawn, pictures]), ("conditions, decoded", *names)
        return Preview(image_grid(to_uint8(pictures), columns=len(batch)), names)

    def _pictures(self, vqgan: VQGAN, codes: Tensor) -> Tensor:
        """The pictures [b,3,h,w] of codes [b,*shape]."""
        decoder = vqgan.to(self.world.device)
        return decoder.config.modality.picture(decoder.decode_codes(codes)).float()

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass

    def export(self) -> Export | None:
        return self.trained.export()


def _known(values: Tensor, batch: CodeBatch) -> Tensor:
    """Values [b, ...] of a batch, not a number for images that the encoder has no codes for, and so
    their gradients: such a step is skipped, and counted with the names of its images, without
    waiting for the device."""
    if batch.coded is None:
        return values
    known = torch.ones_like(batch.coded, dtype=values.dtype).where(batch.coded, torch.nan)
    return values * known.view(-1, *[1] * (values.ndim - 1))
