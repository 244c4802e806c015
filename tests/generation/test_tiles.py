"""Pictures in tiles: those of the whole decode, whatever the sizes, in bounded memory."""

import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from taming_dist.errors import UserError
from taming_dist.generation.tiles import decode_pictures, decode_tiles, picture_tiles, tile_rows
from taming_dist.models.modalities import Depth, LabelMap, Modality
from taming_dist.models.networks import MaskGITConfig
from taming_dist.models.quantizers import VectorQuantizerConfig
from taming_dist.models.vqgan import VQGAN
from tests.tiny_models import tiny_config, tiny_networks

TOLERANCE = 1e-5  # of the largest value, in fp32


def tiny(
    multipliers: list[int], blocks: int = 1, attention: int | None = None, **settings: Modality
) -> VQGAN:
    """`attention`: at this level, counted from the finest."""
    torch.manual_seed(0)
    config = tiny_config(
        VectorQuantizerConfig(codes=20, dim=4),
        32,
        multipliers=multipliers,
        blocks=blocks,
        attention_resolutions=[] if attention is None else [32 >> attention],
        latent_channels=8,
        **settings,
    )
    model = VQGAN(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # gains and biases too
            parameter.add_(torch.randn(parameter.shape) * 0.05)
    return model


def random_codes(*shape: int) -> Tensor:
    return torch.randint(20, shape, generator=torch.Generator().manual_seed(1))


def whole(model: VQGAN, codes: Tensor) -> Tensor:
    with torch.no_grad():
        return model.decode_codes(codes)


@settings(max_examples=8, deadline=None)
@given(
    multipliers=st.lists(st.sampled_from([1, 2]), min_size=1, max_size=3),
    blocks=st.integers(1, 2),
    attention=st.sampled_from([None, 0, 1, 2]),
    grid=st.tuples(st.integers(2, 6), st.integers(2, 3)),
    rows=st.integers(1, 12),
)
def test_tiles_equal_the_whole_decode(
    multipliers: list[int], blocks: int, attention: int | None, grid: tuple[int, int], rows: int
) -> None:
    model, codes = tiny(multipliers, blocks, attention), random_codes(*grid)
    tiles = list(decode_tiles(model, codes, rows))
    height = grid[0] * model.config.factor
    assert [tile.shape[1] for tile in tiles] == [
        min(rows, height - top) for top in range(0, height, rows)
    ]
    check_exact(torch.cat(tiles, 1), model, codes)


def test_tiles_of_maskgits_decoder_equal_the_whole_decode() -> None:
    model, codes = VQGAN(tiny_networks(MaskGITConfig)).eval(), random_codes(5, 3)
    check_exact(torch.cat(list(decode_tiles(model, codes, 3)), 1), model, codes)


def check_exact(found: Tensor, model: VQGAN, codes: Tensor) -> None:
    """Compare with the whole decode in fp64, to the tolerance or to what fp32 makes of it: groups
    of few and nearly the same values magnify rounding."""
    ordinary = whole(model, codes[None])[0]
    exact = whole(model.double(), codes[None])[0]
    allowed = max(TOLERANCE * exact.abs().max(), 3 * (ordinary - exact).abs().max())
    assert (found - exact).abs().max() <= allowed


def test_tiles_are_as_exact_as_the_whole_decode_where_means_are_far_from_zero() -> None:
    """Variances are those of large, nearly constant activations."""
    model, codes = tiny([1, 1]), random_codes(6, 4)
    with torch.no_grad():
        for level in model.decoder.up:
            for block in level.block:
                block.conv1.bias.add_(30.0)
    check_exact(torch.cat(list(decode_tiles(model, codes, 3)), 1), model, codes)


def test_a_bf16_model_gives_the_whole_decode_within_its_rounding() -> None:
    model, codes = tiny([1, 2]).to(torch.bfloat16), random_codes(6, 4)
    expected = whole(model, codes[None])[0]
    found = torch.cat(list(decode_tiles(model, codes, 3)), 1)
    assert found.dtype == torch.bfloat16
    assert (found - expected).abs().max() <= 0.05 * expected.abs().max()


@pytest.mark.parametrize("modality", [LabelMap(classes=5), Depth()])
def test_maps_are_pictures_too(modality: Modality) -> None:
    model, codes = tiny([1, 1], modality=modality), random_codes(2, 6, 4)
    pictures = decode_pictures(model, codes, tile=5)
    assert pictures.shape == (2, 3, 12, 8)
    expected = modality.picture(whole(model, codes)).clamp(-1, 1)
    torch.testing.assert_close(pictures, expected, atol=TOLERANCE, rtol=TOLERANCE)


def test_ordinary_sizes_are_the_whole_decode_bit_for_bit() -> None:
    model, codes = tiny([1, 1]), random_codes(2, 6, 4)
    expected = model.config.modality.picture(whole(model, codes)).clamp(-1, 1)
    for tile in (None, 0, 12, 50):
        assert torch.equal(decode_pictures(model, codes, tile), expected)


def test_a_picture_comes_as_one_tile_unless_it_is_too_large() -> None:
    model, codes = tiny([1, 1]), random_codes(6, 4)
    expected = decode_pictures(model, codes[None])[0]
    (alone,) = picture_tiles(model, codes)
    assert torch.equal(alone, expected)
    found = list(picture_tiles(model, codes, tile=5))
    assert [tile.shape for tile in found] == [(3, 5, 8), (3, 5, 8), (3, 2, 8)]
    torch.testing.assert_close(torch.cat(found, 1), expected, atol=TOLERANCE, rtol=TOLERANCE)


def test_pictures_are_decoded_in_tiles_from_a_size_on_that_depends_on_the_width() -> None:
    narrow, wide = tiny([1, 1]), tiny([1, 2])
    assert tile_rows(narrow, (2048, 2048)) == 0
    assert tile_rows(narrow, (4096, 4096)) == 128
    assert tile_rows(wide, (4096, 4096)) == 64
    assert tile_rows(narrow, (2**20, 2**20)) == 1
    assert tile_rows(narrow, (4096, 4096), 0) == 0
    assert tile_rows(narrow, (256, 256), 16) == 16


def test_a_negative_tile_is_the_users_mistake() -> None:
    with pytest.raises(UserError, match="tile: -1 rows"):
        tile_rows(tiny([1]), (16, 16), -1)


class Largest(TorchDispatchMode):
    """Notes how many bytes the largest tensor has that anything gives."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for each in found if isinstance(found, tuple | list) else (found,):
            if isinstance(each, Tensor):
                self.bytes = max(self.bytes, each.nbytes)
        return found


def largest(run: Callable[[], Any]) -> int:
    with Largest() as seen:
        run()
    return seen.bytes


def test_no_tensor_is_larger_than_a_tile_however_tall_the_picture() -> None:
    model = tiny([1, 1, 1])
    low, tall = random_codes(8, 4), random_codes(24, 4)

    def tiles(codes: Tensor) -> Callable[[], Any]:
        return lambda: [None for _ in decode_tiles(model, codes, 10)]

    row = 32 * 16 * 4  # channels, pixels, bytes
    # a margin of one row below and above, which upsampling doubles
    assert largest(tiles(low)) == largest(tiles(tall)) == (10 + 4) * row
    assert largest(lambda: whole(model, tall[None])) == 96 * row


def test_a_full_scratch_disk_is_named(
    tmp_path: Path, largest_file: Callable[[int], AbstractContextManager[None]]
) -> None:
    model, codes = tiny([1, 1]), random_codes(6, 4)
    with largest_file(2000), pytest.raises(UserError, match=f"{tmp_path} cannot be written"):
        list(decode_tiles(model, codes, 3, scratch=tmp_path))


RSS = """
import re, sys, torch
from tiny_models import tiny_config
from taming_dist.generation.tiles import decode_tiles
from taming_dist.models.networks import MaskGITConfig
from taming_dist.models.quantizers import VectorQuantizerConfig
from taming_dist.models.vqgan import VQGAN

def peak():  # the kernel's ru_maxrss counts what the parent had
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])

torch.set_num_threads(1)
quantizer = VectorQuantizerConfig(codes=20, dim=4)
config = tiny_config(quantizer, 32, multipliers=[1, 1, 1], latent_channels=8)
model, codes = VQGAN(config).eval(), torch.randint(20, (256, 256))
with torch.no_grad():
    model.decode_codes(codes[None, :4, :4])  # what any decode loads
    start = peak()
    if sys.argv[1] == "tiles":
        for tile in decode_tiles(model, codes, 32):
            pass
    else:
        model.decode_codes(codes[None])
print((peak() - start) / 1024)
"""


@pytest.mark.slow
def test_a_megapixel_takes_a_fraction_of_the_memory_in_tiles() -> None:
    """1024 x 1024 at 32 channels: 128 MB for each activation of full resolution."""

    def megabytes(how: str) -> float:
        done = subprocess.run(
            [sys.executable, "-c", RSS, how],
            cwd=Path(__file__).parents[1],
            capture_output=True,
            text=True,
            check=True,
        )
        return float(done.stdout)

    whole_decode, tiles = megabytes("whole"), megabytes("tiles")
    assert whole_decode > 256  # two activations at least
    assert tiles < 0.5 * whole_decode
