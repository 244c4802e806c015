"""Units of large images: stopped anywhere, they are continued as if nothing had been."""

from pathlib import Path
from typing import Any

import pytest
import torch

from taming_dist.errors import UserError
from taming_dist.generation.generator import Generator
from taming_dist.generation.pictures import to_uint8
from taming_dist.generation.sampling import Sampling
from taming_dist.models.prior.conditions import Columns
from taming_dist.sampling.large import Large
from taming_dist.sampling.units import Unit
from tests.generation.test_generator import tiny_transformer, tiny_vqgan

SAMPLING = Sampling(temperature=0.9)


@pytest.fixture(scope="module")
def pair() -> Generator:
    vqgan = tiny_vqgan()
    return Generator(tiny_transformer(vqgan), vqgan)


def large(pair: Generator, **settings: Any) -> Large:
    placement = pair.placement((12, 14))
    assert placement is not None
    return Large(placement, **{"batch": 4, "memory": 1.0} | settings)


def unit_of(folder: Path, images: range = range(3, 5)) -> Unit:
    return Unit(1, images, folder)


class Killed(BaseException):
    pass


def test_a_unit_has_the_codes_of_its_images(pair: Generator, tmp_path: Path) -> None:
    nothing: Columns = {}
    found = large(pair).codes(pair, nothing, SAMPLING, 5, unit_of(tmp_path))
    expected = pair.sample(5, size=(12, 14), seed=5, temperature=0.9).codes
    assert torch.equal(found, expected[3:])


@pytest.mark.parametrize("memory", [-1.0, float("nan")])
def test_memory_that_is_no_amount_is_refused(pair: Generator, memory: float) -> None:
    with pytest.raises(UserError, match="window_memory: .* GiB, give at least 0"):
        pair.sample(1, size=(12, 14), window_memory=memory)


def test_a_unit_that_is_stopped_continues_where_it_was(pair: Generator, tmp_path: Path) -> None:
    expected = large(pair).codes(pair, {}, SAMPLING, 5, unit_of(tmp_path))
    unit_of(tmp_path).forget()
    shares = []
    for stop in (0.3, 0.6):
        unit = unit_of(tmp_path)

        def told(done: float, stop: float = stop) -> None:
            shares.append(done)
            if done > stop:
                raise Killed

        unit.told = told
        with pytest.raises(Killed):
            large(pair).codes(pair, {}, SAMPLING, 5, unit)
        assert unit.resumed()["mask"].float().mean() == shares[-1]
    assert shares == sorted(set(shares)), "what was written is not written again"
    assert torch.equal(large(pair).codes(pair, {}, SAMPLING, 5, unit_of(tmp_path)), expected)


def test_codes_that_are_complete_are_kept_until_they_are_decoded(
    pair: Generator, tmp_path: Path
) -> None:
    written = large(pair).codes(pair, {}, SAMPLING, 5, unit_of(tmp_path))
    assert unit_of(tmp_path).resumed()["mask"].all()
    assert torch.equal(large(pair).codes(pair, {}, SAMPLING, 6, unit_of(tmp_path)), written)


def test_a_picture_comes_in_strips_of_a_tile(pair: Generator, tmp_path: Path) -> None:
    tiled, unit = large(pair, tile=5), unit_of(tmp_path)
    codes = tiled.codes(pair, {}, SAMPLING, 5, unit)[0]
    strips = list(tiled.strips(pair, codes, unit))
    assert [strip.shape for strip in strips] == [(3, 5, 14), (3, 5, 14), (3, 2, 14)]
    whole = to_uint8(pair.pictures(codes[None]))[0]
    assert (torch.cat(strips, 1).int() - whole.int()).abs().max() <= 1


def test_what_was_kept_of_images_of_another_size_is_not_continued(
    pair: Generator, tmp_path: Path
) -> None:
    unit = unit_of(tmp_path)
    unit.save({"codes": torch.zeros(2, 3, 3), "mask": torch.ones(2, 3, 3)})
    assert large(pair).codes(pair, {}, SAMPLING, 5, unit).shape == (2, 6, 7)


def test_as_many_images_are_made_together_as_fill_a_batch(pair: Generator) -> None:
    assert large(pair).placement.widest == 2
    assert [large(pair, batch=batch).images for batch in (1, 2, 3, 8)] == [1, 1, 1, 4]
