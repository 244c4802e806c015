"""What a condition is: how its columns become the prefix that the transformer reads first.

Its fields are its keys below `model.condition`. Everything else asks it: training what it reads of
a batch, sampling what the user has to give, both whether the code shards are of its kind.
Legend: b batch, m positions of the prefix, w width of its features, c width of the transformer.
"""

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeVar

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from taming_dist.errors import UserError
from taming_dist.models.prior.orders import Grid
from taming_dist.models.prior.prefix import Prefix
from taming_dist.models.prior.window import Window

Columns = Mapping[str, Tensor]
Config = TypeVar("Config")


class Codes(Protocol):
    """What a condition asks of a data set of codes, before they are read (`taming_dist.data`)."""

    vocabulary: int
    grid: tuple[int, ...]  # the shape of an image's codes, (i, j), (levels, i, j) or (n,)
    image_size: int | None  # pixels of a side of the square images; None: not known
    tokenizer_fingerprint: str
    condition: Mapping[str, Any] | None
    text: Mapping[str, Any] | None
    num_classes: int
    class_names: tuple[str, ...] | None

    @property
    def classes_present(self) -> bool: ...
    def check_classes(self) -> None: ...
    def require(self, columns: Sequence[str]) -> None: ...


class StoredCodes(Codes, Protocol):
    """Codes whose samples can be looked up (`taming_dist.data.codes.CodeDataset`)."""

    @property
    def num_samples(self) -> int: ...
    def samples(self, images: range, columns: Sequence[str]) -> dict[str, Tensor]: ...


@dataclass(frozen=True)
class Request:
    """What the user of the sampling command asks for: `count` images from number `first` on;
    `class_id` and `condition` as they were typed, None if they were not; `open_codes` opens the
    code shards of a spec, `read_json` reads a file. `prompts`: texts for the images in turn, which
    `encode_texts` turns into the embeddings [n, m, w] that a condition on texts has learned.
    `encode_pictures` gives the codes [n, *shape] of the pictures that are the condition of the
    images with these numbers; None if none are given; `condition` does not name them any more."""

    count: int
    open_codes: Callable[[Any], StoredCodes]
    read_json: Callable[[str], Any]
    class_id: int | None = None
    condition: Any = None
    prompts: tuple[str, ...] = ()
    encode_texts: "Callable[[Condition, Sequence[str]], Tensor] | None" = None
    first: int = 0
    encode_pictures: "Callable[[range], Tensor] | None" = None

    @property
    def images(self) -> range:
        """The numbers of the images; what is given in turn begins with image 0."""
        return range(self.first, self.first + self.count)

    def of(self, images: range) -> "Request":
        """The same for some of the images."""
        return dataclasses.replace(self, first=images.start, count=len(images))

    @property
    def is_file(self) -> bool:
        """Whether the condition is a JSON file rather than code shards."""
        return isinstance(self.condition, str) and self.condition.endswith(".json")


class Condition(ABC):
    """How a batch's condition becomes the prefix that the transformer reads first.

    `has_table`: whether its tokens may have a table of embeddings of their own. `can_drop`: whether
    there is anything that a null prefix could leave out. `takes_class_id`: whether `class_id` of a
    request is for it. `features`: whether its part has features, which only an `embedding` of its
    own can map.
    """

    name: str
    has_table: ClassVar[bool] = True
    can_drop: ClassVar[bool] = True
    takes_class_id: ClassVar[bool] = False
    features: ClassVar[bool] = False

    @property
    def columns(self) -> tuple[str, ...]:
        """What it reads of a batch of codes, of `taming_dist.data.code_columns.COLUMNS`."""
        return ()

    @property
    def conditions(self) -> "tuple[Condition, ...]":
        """The conditions whose parts stand one after the other in the prefix."""
        return (self,)

    @property
    @abstractmethod
    def length(self) -> int:
        """Tokens of the prefix, m; at least 1, from which the image's first is predicted."""

    @property
    @abstractmethod
    def vocabulary(self) -> int:
        """How many different tokens there are."""

    @abstractmethod
    def part(
        self, count: int, columns: Columns
    ) -> Int64[Tensor, "{count} m"] | Float[Tensor, "{count} m w"]:
        """Return its part of the prefixes of `count` images from their columns: token ids from 0 to
        `vocabulary` - 1, or features. It is on the CPU, where values can be checked.

        Raises:
            UserError: a column is missing, or has what the model knows no token for.
        """

    def blank(self) -> Int64[Tensor, "1 m"] | Float[Tensor, "1 m w"]:
        """Return its part of one image's prefix without values, as operations are counted by."""
        return torch.empty(1, self.length, dtype=torch.int64, device="meta")

    def prefix(self, count: int, columns: Columns) -> Prefix:
        """Return the prefixes of `count` images from their columns, as `part` does."""
        return Prefix(tuple(each.part(count, columns) for each in self.conditions))

    def enlarged(self, window: Grid, image: Grid) -> "Condition":
        """Return the condition of images of `image` codes [i, j], larger than the `window` that the
        transformer has learned: what their columns are, which `window` cuts.

        Raises:
            UserError: there is none for images of that size.
        """
        return self

    def window(self, count: int, columns: Columns, window: Window) -> Columns:
        """Return what of the columns of `count` images, larger than what the transformer has
        learned, is the condition of their window; the very same where that is all of it."""
        return columns

    def draw(self, count: int, generator: torch.Generator) -> Columns:
        """Return the random numbers of a training batch of `count` images, which `part` finds among
        the columns, a row for each image; in validation and sampling there are none."""
        return {}

    def embedding(self, width: int) -> nn.Module:
        """Return the module of its own that maps its part of a prefix to [b, m, width]."""
        return nn.Embedding(self.vocabulary, width)

    def check(self) -> None:
        """Raise a UserError, naming the key, if its keys do not describe a condition."""
        if self.length < 1 or self.vocabulary < 1:
            raise UserError(
                f"model/condition={self.name}: a prefix of {self.length} tokens, of "
                f"{self.vocabulary} there are, is none; give its keys"
            )

    def fitted(self, codes: Codes, spec: Any) -> "Condition":
        """Return it with what the code shards say where its keys leave it open.

        Raises:
            UserError: they lack what it reads, or are not of its kind; `spec` names them.
        """
        codes.require(self.columns)
        return self

    def given(self, value: Any) -> Columns:
        """Return the columns of what Python gives for it: all of them by name, or its only one."""
        if isinstance(value, Mapping):
            return {name: torch.as_tensor(column).cpu() for name, column in value.items()}
        return {self.columns[0]: torch.as_tensor(value).cpu()}

    def images(self, columns: Columns) -> int:
        """Return how many images the columns are of, none of which may be missing."""
        return len(next(iter(columns.values())))

    def requested(self, request: Request) -> Columns:
        """Return the columns of the images that sampling is asked for.

        Unless it has another way, image k has those of sample k of `condition=SHARDS`.

        Raises:
            UserError: the request does not say what it needs, or what it cannot use.
        """
        if request.class_id is not None:
            raise UserError("class_id: this transformer is not class-conditional, leave it out")
        if request.condition is None:
            return {}
        if request.is_file:
            raise UserError(
                f"condition: {request.condition} is no code shards, which {self.name} needs; name "
                f"each of several, such as condition={{codes: SHARDS, objects: FILE.json}}"
            )
        codes, spec = request.open_codes(request.condition), request.condition
        try:
            self.fitted(codes, spec)
        except UserError as error:
            raise UserError(f"condition: {error}") from error
        if request.images.stop > codes.num_samples:
            raise UserError(
                f"n: {request.images.stop} images need as many samples in {spec}, which has "
                f"{codes.num_samples}"
            )
        return codes.samples(request.images, self.columns)

    def period(self, request: Request) -> int:
        """After how many images of a request the conditions repeat; 1 where they do not."""
        return 1


def shown(value: Any) -> str:
    """A value as it is typed on the command line."""
    return str(value).replace(" ", "")


def agreed(config: Config, found: Mapping[str, Any], key: str, spec: Any) -> Config:
    """Return a config class with the values that code shards have; `key` is its own, such as model.

    Raises:
        UserError: it has another value already; `spec` names the shards.
    """
    for name, value in found.items():
        asked = getattr(config, name)
        if asked and asked != value:
            raise UserError(
                f"{key}.{name} is {asked}, but the codes of {spec} have {value}: use the codes of "
                f"that tokenizer, or set {key}.{name}={shown(value)}"
            )
    return dataclasses.replace(config, **found)  # type: ignore[type-var]
