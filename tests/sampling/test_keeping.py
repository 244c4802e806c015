"""Completion and variation of given pictures: what is kept stays bit for bit, and what is not is
sampled; what contradicts itself is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from taming_dist.errors import UserError
from taming_dist.generation.completion import Known, half
from taming_dist.models.modalities import LabelMap
from taming_dist.models.prior.orders import SpiralOut, arrange
from taming_dist.models.prior.schemes import Masked
from taming_dist.models.vqgan import VQGAN
from taming_dist.sample import load_generator, main
from taming_dist.sampling.plan import Plan, plan_of
from tests.sampling.conftest import Asked, codes_condition, grey_map, photograph
from tests.tiny_models import save_transformer, save_vqgan

MODELS: dict[str, dict[str, Any]] = {
    "raster": {},
    "spiral": {"order": SpiralOut()},
    "masked": {"scheme": Masked(steps=3), "order": SpiralOut()},
}


def plan(config: Any) -> Plan:
    return plan_of(config, load_generator(config))


def codes_of(found: Plan, images: range) -> torch.Tensor:
    """The codes of the images that a plan makes."""
    prefix = found.generator.prefix(len(images), found.columns(images) or None)
    stream = found.generator.stream(
        prefix, found.sampling, found.seed, 2, images.start, found.known(images), found.rejection
    )
    return torch.cat([part.codes for part in stream])


@pytest.fixture(params=list(MODELS))
def transformer(request: pytest.FixtureRequest, exports: Path, tmp_path: Path) -> Path:
    vqgan = VQGAN.from_pretrained(exports / "vqgan")
    return save_transformer(tmp_path / "gpt", vqgan, **MODELS[request.param])


def painted(path: Path, size: tuple[int, int], top: int, left: int) -> Path:
    """A mask that is white from a row and column on."""
    pixels = np.zeros(size, np.uint8)
    pixels[top:, left:] = 255
    return grey_map(path, pixels)


def test_what_is_kept_stays_and_the_rest_is_sampled(
    asked: Asked, transformer: Path, tmp_path: Path
) -> None:
    image = photograph(tmp_path / "photo.png", size=(8, 8))
    mask = painted(tmp_path / "mask.png", (8, 8), 3, 0)  # the second row of codes is touched
    small = painted(tmp_path / "small.png", (4, 4), 1, 2)
    for way, region in (
        ({"keep": "upper"}, half("upper", (4, 4))),
        ({"keep": 0.25}, half(0.25, (4, 4))),
        ({"keep": "right"}, half("right", (4, 4))),
        ({"mask": str(mask)}, half(0.25, (4, 4))),
        ({"mask": str(small)}, ~half("lower", (4, 4)) & half(0.25, (4, 4)) | half("left", (4, 4))),
    ):
        found = plan(asked(transformer=transformer, image=str(image), n=5, **way))
        known = found.known(range(5))
        assert known is not None
        assert torch.equal(known.mask, region.expand(5, -1, -1))
        whole = found.generator.vqgan.encode(found.given[0].given.input(0))
        codes = codes_of(found, range(5))
        assert torch.equal(codes[:, region], whole[:, region].expand(5, -1))
        assert len(codes[:, ~region].unique(dim=0)) > 1


def test_a_variation_keeps_the_first_codes_of_the_order(
    asked: Asked, transformer: Path, tmp_path: Path
) -> None:
    image = photograph(tmp_path / "photo.png")
    found = plan(asked(transformer=transformer, image=str(image), keep_codes=5, n=3))
    places = found.generator.transformer.places
    whole = found.generator.vqgan.encode(found.given[0].given.input(0))
    tokens = arrange(codes_of(found, range(3)), places)
    assert torch.equal(tokens[:, :5], arrange(whole, places)[:, :5].expand(3, -1))
    assert len(tokens[:, 5:].unique(dim=0)) > 1


def test_a_completion_depends_on_its_number_not_on_its_batch(
    asked: Asked, transformer: Path, tmp_path: Path
) -> None:
    for number in range(3):
        photograph(tmp_path / "photos" / f"{number}.png", number)
    found = plan(asked(transformer=transformer, image=str(tmp_path / "photos"), keep="left", n=7))
    together = codes_of(found, range(7))
    alone = [codes_of(found, range(number, number + 1)) for number in range(7)]
    assert torch.equal(together, torch.cat(alone))


def test_python_completes_codes(exports: Path, asked: Asked) -> None:
    generator = load_generator(asked())
    codes = torch.randint(16, (2, 4, 4), generator=torch.Generator().manual_seed(0))
    known = Known(codes, half("upper", (4, 4)))
    assert torch.equal(generator.sample(known=known).codes[:, :2], codes[:, :2])
    images, found = generator.sample(5, known=known, seed=1)
    assert images.shape == (5, 3, 8, 8)
    assert torch.equal(found[:, :2], codes[[0, 1, 0, 1, 0], :2])
    with pytest.raises(UserError, match=r"known: codes of the grid \[3, 4\]"):
        generator.sample(known=Known(codes[:, :3], half("upper", (3, 4))))
    with pytest.raises(UserError, match="known: a code is outside of 0 to 15"):
        generator.sample(known=Known(codes + 16, half("upper", (4, 4))))


def test_completions_stand_beside_what_was_kept(
    asked: Asked, exports: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = photograph(tmp_path / "photo.png", size=(20, 30))
    main(asked(image=str(image), keep="lower", n=3))
    grid = np.asarray(Image.open(tmp_path / "o" / "grid.png"))
    assert grid.shape == (2 * 8 + 2, 2 * 8 + 2, 3)
    assert len(np.unique(grid[:4, :8])) == 1  # what is not known is flat
    assert len(np.unique(grid[4:8, :8])) > 1
    assert "note: 8 of the 8 codes that are kept come after" in capsys.readouterr().err
    written = json.loads((tmp_path / "o" / "samples.json").read_text())
    assert {each["image"] for each in written["images"]} == {str(image)}


def test_a_folder_has_a_mask_for_each_or_one_for_all(asked: Asked, tmp_path: Path) -> None:
    for number in range(2):
        photograph(tmp_path / "photos" / f"{number}.jpg", number, (16, 16))
        painted(tmp_path / "masks" / f"{number}.png", (16, 16), 4 + 4 * number, 0)
    photos = str(tmp_path / "photos")
    found = plan(asked(image=photos, mask=str(tmp_path / "masks"))).known(range(2))
    assert found is not None
    assert found.mask.sum(dim=(1, 2)).tolist() == [4, 8]
    found = plan(asked(image=photos, mask=str(tmp_path / "masks" / "0.png"))).known(range(2))
    assert found is not None
    assert found.mask.sum(dim=(1, 2)).tolist() == [4, 4]
    (tmp_path / "masks" / "1.png").unlink()
    with pytest.raises(UserError, match=r"mask: .*masks has no mask for 1.jpg"):
        plan(asked(image=photos, mask=str(tmp_path / "masks")))


def test_a_conditional_image_is_completed_too(asked: Asked, exports: Path, tmp_path: Path) -> None:
    second = save_vqgan(tmp_path / "second", LabelMap(3), 12)
    vqgan = VQGAN.from_pretrained(exports / "vqgan")
    transformer = save_transformer(tmp_path / "gpt", vqgan, condition=codes_condition(second))
    photos = [photograph(tmp_path / f"{number}.jpg", number, (8, 8)) for number in range(2)]
    label_map = grey_map(tmp_path / "map.png", np.eye(8, dtype=np.uint8))
    given = {"transformer": transformer, "condition_vqgan": tmp_path / "second", "keep": "upper"}
    maps = [str(label_map)] * 3
    main(asked(**given, image=[str(photo) for photo in photos], condition=str(label_map)))
    grid = Image.open(tmp_path / "o" / "grid.png")
    assert grid.size == (6 * 8 + 5 * 2, 8)  # label map, photograph, completion; twice
    with pytest.raises(UserError, match=r"image: it has 2 pictures and condition 3"):
        plan(asked(**given, image=[str(photo) for photo in photos], condition=maps, n=6))


def test_what_contradicts_itself_is_refused(asked: Asked, tmp_path: Path) -> None:
    image = photograph(tmp_path / "photo.png", size=(8, 10))
    given = {"image": str(image)}
    mask = {
        name: str(painted(tmp_path / f"{name}.png", size, top, 0))
        for name, size, top in (
            ("other", (9, 9), 3),
            ("black", (8, 10), 8),
            ("white", (8, 10), 0),
        )
    }
    for settings, message in (
        (given, "image: which part of it is kept.: give one of keep=upper, mask=PICTURE"),
        (
            given | {"keep": "upper", "mask": mask["other"]},
            "image: not both keep and mask: give one of",
        ),
        ({"keep": "upper"}, "keep: of what"),
        ({"keep_codes": 3}, "keep_codes: of what"),
        (given | {"keep": "middle"}, "keep=middle: use upper"),
        (given | {"keep": 0.01}, "keep: 0.01 is none or all"),
        (given | {"keep_codes": 16}, "keep_codes: 16 of 16 codes leave nothing to sample"),
        (given | {"keep_codes": 0}, "keep_codes=0"),
        (given | {"mask": mask["other"]}, r"mask: .* has 9 x 9 pixels, but .* has 8 x 10"),
        (given | {"mask": mask["black"]}, r"mask: .* keeps every code"),
        (given | {"mask": mask["white"]}, r"mask: .* keeps no code: black is kept"),
        (given | {"mask": str(tmp_path / "no.png")}, "mask: there is no file"),
        (given | {"mask": 3}, "mask=3: name a picture or a folder of pictures"),
        ({"image": "", "keep": "left"}, "image: name a picture or a folder of pictures"),
        ({"image": str(tmp_path / "no.png"), "keep": "left"}, "image: there is no file"),
    ):
        with pytest.raises(UserError, match=message) as refused:
            main(asked(**settings))
        assert len(str(refused.value).splitlines()) == 1
        assert not (tmp_path / "o").exists()


def test_a_window_completes_a_larger_image_from_pictures(
    asked: Asked, exports: Path, tmp_path: Path
) -> None:
    second = save_vqgan(tmp_path / "second", LabelMap(3), 12)
    vqgan = VQGAN.from_pretrained(exports / "vqgan")
    transformer = save_transformer(tmp_path / "gpt", vqgan, condition=codes_condition(second, 2))
    photo = photograph(tmp_path / "photo.jpg", size=(16, 24))
    label_map = grey_map(tmp_path / "map.png", np.tri(16, 25, dtype=np.uint8))
    config = asked(
        transformer=transformer,
        condition_vqgan=str(tmp_path / "second"),
        condition=str(label_map),
        image=str(photo),
        keep="lower",
        size="16x24",
        n=2,
    )
    found = plan(config)
    assert found.columns(range(2))["cond"].shape == (2, 4, 6)  # half of the image's codes a side
    known = found.known(range(1))
    assert known is not None
    assert torch.equal(known.codes, found.generator.vqgan.encode(found.given[1].given.input(0)))
    assert known.mask[0, :, 0].tolist() == [False] * 4 + [True] * 4
    main(config)
    assert Image.open(tmp_path / "o" / "000001.png").size == (24, 16)
    assert Image.open(tmp_path / "o" / "grid.png").size == (2 * 24 + 2, 2 * 16 + 2)
