"""Pictures written in strips: any reader finds the pixels and texts of the whole."""

import io

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from taming_dist.formats.png_strips import write_png_strips


def written(picture: torch.Tensor, rows: int, texts: dict[str, str]) -> bytes:
    file = io.BytesIO()
    write_png_strips(picture.split(rows, dim=1), (picture.shape[1], picture.shape[2]), file, texts)
    return file.getvalue()


def gradient(height: int, width: int) -> torch.Tensor:
    """What every filter but none is good at."""
    down, right = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack([down * 3 + right, down * right, right * 2 - down]).remainder(256).byte()


@settings(max_examples=20, deadline=None)
@given(
    height=st.integers(1, 9),
    width=st.integers(1, 9),
    rows=st.integers(1, 9),
    smooth=st.booleans(),
    seed=st.integers(0, 99),
)
def test_a_reader_finds_the_pixels_of_any_strips(
    height: int, width: int, rows: int, smooth: bool, seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    picture = torch.randint(0, 256, (3, height, width), generator=random).byte()
    picture = gradient(height, width) if smooth else picture
    with Image.open(io.BytesIO(written(picture, rows, {}))) as image:
        assert image.mode == "RGB"
        found = np.asarray(image)
    assert np.array_equal(found, picture.permute(1, 2, 0).numpy())


def test_a_reader_finds_the_texts() -> None:
    texts = {"Description": "a caf\u00e9", "recipe": '{"seed": 3}'}
    with Image.open(io.BytesIO(written(gradient(4, 5), 3, texts))) as image:
        image.load()
        assert dict(image.text) == texts


@pytest.mark.parametrize("rows", [1, 16, 64])
def test_the_file_is_as_small_as_pillows(rows: int) -> None:
    noise = torch.randint(0, 4, (3, 64, 80), generator=torch.Generator().manual_seed(0))
    picture = gradient(64, 80) + noise.byte()
    whole = io.BytesIO()
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(whole, format="PNG")
    assert len(written(picture, rows, {})) < 1.02 * len(whole.getvalue())
