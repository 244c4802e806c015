import io

import numpy as np
import pytest
import torch
from PIL import Image

from taming_dist.data.faults import BrokenData
from taming_dist.data.images import Preprocess, decode, decode_labels, resize_short_side, to_float
from taming_dist.errors import UserError

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 20, 3), dtype=np.uint8)


def encode(image: Image.Image, kind: str, **options: int) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


@pytest.mark.parametrize(
    ("mode", "kind"),
    [("RGB", "JPEG"), ("L", "JPEG"), ("CMYK", "JPEG"), ("RGB", "PNG"), ("RGBA", "PNG"),
     ("P", "PNG"), ("LA", "PNG"), ("RGB", "WEBP")],
)  # fmt: skip
def test_every_kind_of_image_becomes_what_pillow_makes_of_it(mode: str, kind: str) -> None:
    data = encode(Image.fromarray(PIXELS).convert(mode), kind)
    assert np.array_equal(decode(data), np.array(Image.open(io.BytesIO(data)).convert("RGB")))


def test_damaged_cut_deep_and_huge_images_are_broken_data() -> None:
    whole = encode(Image.fromarray(PIXELS), "JPEG")
    deep = encode(Image.fromarray(np.zeros((4, 4), dtype=np.uint16)), "PNG")
    png = encode(Image.fromarray(PIXELS), "PNG")
    for data in (b"", b"no image", whole[:-200], whole[:3], png[:-30], deep):
        with pytest.raises(BrokenData):
            decode(data)
    for data in (whole, png):
        with pytest.raises(BrokenData, match="bomb"):
            decode(data, max_pixels=239)


def test_label_maps_keep_their_numbers() -> None:
    labels = PIXELS[:, :, 0]
    assert np.array_equal(decode_labels(encode(Image.fromarray(labels), "PNG")), labels)
    palette = Image.fromarray(labels)
    palette.putpalette(list(range(255, -1, -1)) * 3)
    assert np.array_equal(decode_labels(encode(palette, "PNG")), labels)
    with pytest.raises(BrokenData, match="RGB"):
        decode_labels(encode(Image.fromarray(PIXELS), "PNG"))


def test_the_short_side_is_resized_only_if_it_differs() -> None:
    assert resize_short_side(PIXELS, 12) is PIXELS
    assert resize_short_side(PIXELS, 6).shape == (6, 10, 3)
    assert resize_short_side(PIXELS.transpose(1, 0, 2), 24).shape == (40, 24, 3)


def test_the_centre_is_cut_from_the_centre() -> None:
    image, _ = Preprocess(12)(PIXELS, None, seed=0, epoch=0, sample=0)
    assert np.array_equal(image, PIXELS[:, 4:16].transpose(2, 0, 1))


def test_label_map_and_image_are_cut_and_flipped_alike() -> None:
    preprocess = Preprocess(8, crop="random", flip=True)
    for sample in range(20):
        image, labels = preprocess(PIXELS[:8], PIXELS[:8, :, 0], seed=3, epoch=1, sample=sample)
        assert labels is not None
        assert np.array_equal(image[0], labels)


def test_crops_depend_on_seed_epoch_and_sample_and_reach_every_place() -> None:
    columns = np.broadcast_to(np.arange(20, dtype=np.uint8), (8, 20))
    pixels = np.stack([columns] * 3, axis=-1)
    preprocess = Preprocess(8, crop="random", flip=True)

    def draw(seed: int, epoch: int, sample: int) -> tuple[int, bool]:
        row = preprocess(pixels, None, seed, epoch, sample)[0][0, 0].astype(int)
        return int(row.min()), bool(row[0] > row[-1])

    drawn = [draw(0, 0, sample) for sample in range(400)]
    assert drawn == [draw(0, 0, sample) for sample in range(400)]
    assert drawn != [draw(0, 1, sample) for sample in range(400)]
    assert drawn != [draw(1, 0, sample) for sample in range(400)]
    assert {left for left, _ in drawn} == set(range(13))
    assert 150 < sum(flipped for _, flipped in drawn) < 250


def test_a_label_map_of_another_size_is_broken_data() -> None:
    with pytest.raises(BrokenData, match="label map"):
        Preprocess(8)(PIXELS, PIXELS[1:, :, 0], 0, 0, 0)


def test_an_unknown_crop_is_a_users_mistake() -> None:
    with pytest.raises(UserError, match=r"data\.crop is 'middle'"):
        Preprocess(8, crop="middle")


def test_floats_span_minus_one_to_one() -> None:
    assert to_float(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1.0, 1.0]
