"""Large images through a window: all at once against one code after the other, without a cache."""

import math
from collections.abc import Iterator, Mapping
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from taming_dist.errors import UserError
from taming_dist.generation.completion import Known
from taming_dist.generation.draws import uniforms
from taming_dist.generation.generator import generate_codes
from taming_dist.generation.placement import Placement
from taming_dist.generation.sampling import Sampling
from taming_dist.generation.window import check_windows, write_codes
from taming_dist.models.prior.blocks import Around, GPTBlockConfig
from taming_dist.models.prior.conditions import (
    ClassCondition,
    CodesCondition,
    Condition,
    CoordinatesCondition,
    ObjectsCondition,
    SeveralConditions,
    Unconditional,
)
from taming_dist.models.prior.transformer import Transformer, TransformerConfig
from taming_dist.models.prior.window import Window
from tests.engine.waiting import Waiting

Grid = tuple[int, int]


def tiny(grid: Grid, condition: Condition, **settings: Any) -> Transformer:
    """A transformer whose logits depend much on all that it reads."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"layers": 2, "heads": 2, "width": 16, "condition_table": "own"}
    config = TransformerConfig(12, list(grid), condition=condition, **sizes | settings)
    model = Transformer(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.4)
    return model


def corner(place: int, side: int, whole: int, step: int) -> int:
    """Where the window of a code begins, along one side: for step 1 as the original has it."""
    half = side // 2
    if step == 1 and side % 2 == 0:
        if place <= half:
            inside = place
        elif whole - place < half:
            inside = side - (whole - place)
        else:
            inside = half
        return place - inside
    begin = 0
    while place - (begin + step) >= half and begin < whole - side:
        begin += step
    return min(begin, whole - side)


@torch.no_grad()
def one_by_one(
    model: Transformer,
    columns: Mapping[str, Tensor],
    known: Known,
    drawn: Tensor,
    sampling: Sampling,
    step: int,
) -> Tensor:
    """Code after code, row by row, each from a pass over the whole window as it is then."""
    height, width = known.mask.shape[1:]
    rows, across = model.config.code_grid
    codes, count = known.codes.clone(), len(known.codes)
    for i in range(height):
        for j in range(width):
            top, left = corner(i, rows, height, step), corner(j, across, width, step)
            seen = codes[:, top : top + rows, left : left + across].flatten(1)
            window = Window(top, left, (rows, across), (height, width))
            cut = model.condition.window(count, columns, window)
            prefix = model.condition.prefix(count, cut)
            at = (i - top) * across + j - left
            logits = model(seen, prefix)[:, at]
            if sampling.guidance != 1:
                null = model(seen, prefix.dropping(torch.ones(count, dtype=torch.bool)))[:, at]
                logits = null + sampling.guidance * (logits - null)
            chosen = sampling.choose(logits, drawn[:, i * width + j])
            codes[:, i, j] = torch.where(known.mask[:, i, j], codes[:, i, j], chosen)
    return codes


def columns_of(image: Grid, half: bool) -> dict[str, Tensor]:
    """What every condition here finds its own among, of two images."""
    drawn = torch.Generator().manual_seed(3)
    cond = (image[0] // 2, image[1] * 2) if half else image
    return {
        "cls": torch.randint(6, (2,), generator=drawn),
        "cond": torch.randint(7, (2, *cond), generator=drawn),
        "boxes": torch.rand(6, 4, generator=drawn) / 2,
        "box_class": torch.randint(5, (6,), generator=drawn),
        "box_flags": torch.randint(2, (6,), generator=drawn),
        "box_ends": torch.tensor([2, 6]),
        "crop": torch.tensor([[0.0, 0, 1, 1, 0], [0.5, 0, 0.5, 1, 1]]),
    }


OBJECTS: dict[str, Any] = {"categories": 5, "vocabulary": 60, "objects": 2}


def conditions(grid: Grid) -> list[Condition]:
    halved = [grid[0] // 2, grid[1] * 2] if grid[0] % 2 == 0 else list(grid)
    codes, places = CodesCondition(7, halved), CoordinatesCondition(50, list(grid), 4)
    objects = ObjectsCondition(**OBJECTS)
    return [Unconditional(), ClassCondition(6), codes, places, objects,
            SeveralConditions([ClassCondition(6), codes])]  # fmt: skip


@st.composite
def requests(draw: st.DrawFn) -> dict[str, Any]:
    grid = draw(st.integers(2, 4)), draw(st.integers(2, 4))
    image = grid[0] + draw(st.integers(0, 4)), grid[1] + draw(st.integers(0, 4))
    halved = grid[0] % 2 == 0
    condition = draw(st.sampled_from(conditions(grid)))
    if halved and image[0] % 2:
        image = image[0] + 1, image[1]
    guidance = draw(st.sampled_from([1.0, 2.0])) if condition.can_drop else 1.0
    return {
        "grid": grid,
        "image": image,
        "condition": condition,
        "columns": columns_of(image, halved),
        "block": draw(st.sampled_from(["gpt", "llama", "rar", GPTBlockConfig(condition.length)])),
        "guidance": guidance,
        "step": draw(st.integers(1, min(side - side // 2 for side in grid))),
        "batch": draw(st.integers(1, 9)),
        "memory": draw(st.sampled_from([0.0, 1e-4, 1.0])),
        "seed": draw(st.integers(0, 99)),
        "share": draw(st.sampled_from([0.0, 0.0, 0.3])),
    }


def last(steps: Iterator[Known]) -> Tensor:
    """The codes when all is known."""
    *_, known = steps
    assert known.mask.all()
    return known.codes


@given(requests())
@settings(max_examples=10, deadline=None)
def test_the_codes_are_those_of_one_after_the_other(request: dict[str, Any]) -> None:
    grid, image, condition = request["grid"], request["image"], request["condition"]
    model = tiny(grid, condition, block=request["block"], null_prefix=condition.can_drop)
    sampling = Sampling(top_k=7, guidance=request["guidance"])
    drawn = uniforms(request["seed"], range(2), image[0] * image[1], torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    known = Known(
        torch.randint(12, (2, *image), generator=generator),
        torch.rand(2, *image, generator=generator) < request["share"],
    )
    columns = request["columns"]
    placement = Placement(grid, image, request["step"])
    steps = write_codes(
        model, columns, known, drawn, sampling, placement, request["batch"], request["memory"]
    )
    expected = one_by_one(model, columns, known, drawn, sampling, request["step"])
    assert torch.equal(last(steps), expected)


def request(grid: Grid, image: Grid, step: int = 1, **settings: Any) -> dict[str, Any]:
    """What `write_codes` takes for two images conditioned on codes."""
    return {
        "transformer": tiny(grid, CodesCondition(7, list(grid)), **settings),
        "columns": columns_of(image, half=False),
        "known": Known.nothing(2, image),
        "uniforms": uniforms(0, range(2), image[0] * image[1], torch.device("cpu")),
        "sampling": Sampling(),
        "placement": Placement(grid, image, step),
    }


def test_a_window_of_8_through_12_by_20_codes_gives_what_the_originals_loop_gives() -> None:
    asked = request((8, 8), (12, 20), width=32)
    asked["sampling"] = Sampling(temperature=0)
    expected = one_by_one(
        asked["transformer"], asked["columns"], asked["known"], asked["uniforms"],
        asked["sampling"], 1,
    )  # fmt: skip
    assert torch.equal(last(write_codes(**asked)), expected)
    assert len(expected.unique()) > 5


def test_a_window_as_large_as_the_image_gives_what_sampling_gives() -> None:
    asked = request((3, 4), (3, 4))
    model = asked["transformer"]
    prefix = model.condition.prefix(2, asked["columns"])
    expected = generate_codes(model, prefix, Sampling(), 0, range(2))
    assert torch.equal(last(write_codes(**asked)), expected)


@pytest.mark.parametrize("step", [1, 2])
def test_what_was_written_so_far_is_continued_as_if_nothing_had_been(step: int) -> None:
    asked = request((4, 4), (7, 9), step)
    states = list(write_codes(**asked))
    for at in (0, len(states) // 3, len(states) - 2):
        assert not states[at].mask.all()
        again = last(write_codes(**asked | {"known": states[at]}))
        assert torch.equal(again, states[-1].codes)
    assert list(write_codes(**asked | {"known": states[-1]})) == []
    shares = [float(state.mask.float().mean()) for state in states]
    assert shares == sorted(set(shares))


def test_windows_that_stand_still_read_each_code_once() -> None:
    """Of the tokens that a network reads, most come with the first look at a window."""
    for step, memory, expected in ((1, 1.0, 3), (1, 0.0, 1), (3, 1.0, 8), (3, math.inf, 8)):
        asked = request((6, 6), (11, 11), step)
        model = asked["transformer"]
        read = 0

        def counted(x: Tensor, around: Around, forward: Any = model.blocks[0].forward) -> Tensor:
            nonlocal read
            read += x.shape[0] * x.shape[1]
            return forward(x, around)

        with mock.patch.object(model.blocks[0], "forward", counted):
            last(write_codes(**asked, memory=memory))
        whole = 2 * 121 * (36 + 36 - 1)  # what the original reads
        assert whole / read > expected, whole / read


def test_while_a_large_image_is_written_the_host_waits_for_nothing() -> None:
    asked = request((4, 4), (6, 7), null_prefix=True)
    asked["sampling"] = Sampling(0.9, 5, 0.9, guidance=2.0)
    with Waiting() as waiting:
        for _ in write_codes(**asked):
            pass
    assert waiting.found == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scheme": "masked"}, "size: a transformer of model/scheme=masked writes"),
        ({"order": "z_curve"}, "size: .*row by row.* model/order=z_curve: leave size out"),
    ],
)
def test_transformers_that_do_not_write_row_by_row_are_refused(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        check_windows(tiny((4, 4), Unconditional(), **settings))
    check_windows(tiny((4, 4), Unconditional(), order="rar"))
