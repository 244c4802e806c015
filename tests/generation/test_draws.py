"""Draws: the generator's published answers, and what a number depends on."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from taming_dist.generation.draws import philox, uniforms

CPU = torch.device("cpu")
ONES = 0xFFFFFFFF
# counter, key and answer of Philox4x32-10 in Random123's known answers
PI = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)
ANSWERS = [
    ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES,) * 4, (ONES,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (*PI, (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)),
]


@pytest.mark.parametrize(("counter", "key", "answer"), ANSWERS)
def test_the_generator_gives_its_published_answers(
    counter: tuple[int, ...], key: tuple[int, ...], answer: tuple[int, ...]
) -> None:
    one, two, three, four = (torch.tensor([word]) for word in counter)
    found = philox((one, two, three, four), *key)
    assert tuple(int(word) for word in found) == answer


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(-(2**63), 2**64 - 1),
    images=st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=4),
    count=st.integers(1, 5),
)
def test_a_number_depends_on_seed_image_and_position_only(
    seed: int, images: list[int], count: int
) -> None:
    drawn = uniforms(seed, images, count, CPU)
    assert drawn.shape == (len(images), count)
    assert 0 <= drawn.min() <= drawn.max() < 1
    for row, image in enumerate(images):
        assert torch.equal(uniforms(seed, [image], count + 2, CPU)[0, :count], drawn[row])
    assert torch.equal(uniforms(seed % 2**64, images, count, CPU), drawn)
    assert not torch.equal(uniforms(seed + 1, images, count, CPU), drawn)
    others = [(image + 1) % 2**63 for image in images]
    assert not torch.equal(uniforms(seed, others, count, CPU), drawn)


def test_all_64_bits_of_the_seed_and_63_of_the_image_count() -> None:
    seeds = [uniforms(1 << bit, [0], 1, CPU).item() for bit in range(64)]
    images = uniforms(0, [1 << bit for bit in range(63)], 1, CPU).flatten().tolist()
    assert len({uniforms(0, [0], 1, CPU).item(), *seeds, *images}) == 1 + 64 + 63


def test_uniforms_are_uniform_across_images_and_positions() -> None:
    rows = uniforms(0, range(200), 100, CPU)
    assert rows.mean().item() == pytest.approx(0.5, abs=0.01)
    shares = rows.flatten().histc(10, 0, 1) / 20_000
    assert torch.allclose(shares, torch.full_like(shares, 0.1), atol=0.01)
    for neighbours in (rows.flatten().unfold(0, 2, 1), rows.T.flatten().unfold(0, 2, 1)):
        assert torch.corrcoef(neighbours.T)[0, 1].abs() < 0.03


def test_uniforms_stay_what_they_are() -> None:
    # images of published seeds must not change
    words = [0x6627E8D5, 0xE169C58D]
    assert uniforms(0, [0], 1, CPU).item() == ((words[1] << 32 | words[0]) >> 11) / 2**53
    assert uniforms(1, [2], 2, CPU).tolist() == [[0.5505031244603771, 0.8555402948329229]]
