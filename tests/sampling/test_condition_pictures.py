"""Pictures as the condition: their codes are those of tokenization, and what does not fit is
refused."""

import json
import runpy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from taming_dist.data.codes import CodeDataset
from taming_dist.errors import UserError
from taming_dist.models.modalities import Depth, Edges, LabelMap, LowResolution, Modality
from taming_dist.models.prior.conditions import ClassCondition, SeveralConditions
from taming_dist.models.prior.orders import SpiralOut
from taming_dist.models.prior.schemes import Masked
from taming_dist.models.vqgan import VQGAN
from taming_dist.sample import load_generator, main
from taming_dist.sampling.plan import Plan, plan_of
from tests.prepare.making.test_layers import raw_png
from tests.sampling.conftest import Asked, codes_condition, grey_map, photograph
from tests.tiny_models import save_transformer, save_vqgan

TOOLS = Path(__file__).parents[2] / "tools"
SIZES = ((12, 14), (20, 10), (8, 8))  # even: their halves have the same proportions


def tool(name: str, *arguments: object) -> None:
    runpy.run_path(str(TOOLS / name))["main"]([str(argument) for argument in arguments])


def write_maps(folder: Path, kind: str, photographs: Sequence[Path]) -> None:
    """The map of each photograph: of the same size, but smaller for a low resolution."""
    for number, (path, (height, width)) in enumerate(zip(photographs, SIZES, strict=True)):
        rng = np.random.default_rng(number)
        target = folder / path.name
        if kind == "lr":
            photograph(target, 50 + number, (-(-height // 2), -(-width // 2)))
        elif kind == "depth":
            coarse = rng.integers(0, 65536, (4, 5)).astype(np.float32)
            smooth = np.array(Image.fromarray(coarse).resize((width, height)))
            grey_map(target, smooth.clip(0, 65535).astype(np.uint16))
        else:
            top = {"seg": 3, "edges": 2}[kind]
            pixels = rng.integers(0, top, (height, width)).astype(np.uint8)
            grey_map(target, pixels * np.uint8(255) if kind == "edges" else pixels)


def plan(config: Any) -> Plan:
    return plan_of(config, load_generator(config))


@pytest.mark.parametrize(
    ("modality", "kind", "option", "side"),
    [
        (LabelMap(3), "seg", "--segmentations", 4),
        (LabelMap(3), "seg", "--segmentations", 2),
        (Depth(), "depth", "--depth", 4),
        (Edges(), "edges", "--edges", 4),
        (LowResolution(), "lr", "--low-resolution", 4),
    ],
)
def test_pictures_have_the_codes_that_they_have_in_code_shards(
    asked: Asked,
    exports: Path,
    tmp_path: Path,
    modality: Modality,
    kind: str,
    option: str,
    side: int,
) -> None:
    photographs = [
        photograph(tmp_path / "images" / f"{number}.png", number, size)
        for number, size in enumerate(SIZES)
    ]
    write_maps(tmp_path / kind, kind, photographs)
    second = save_vqgan(tmp_path / "second", modality, 12)
    images = ["--images", tmp_path / "images", "--out", tmp_path / "shards", "--workers", 1]
    tool("make_shards.py", *images, option, tmp_path / kind)
    models = ["--model", exports / "vqgan", "--condition-model", tmp_path / "second"]
    models += ["--condition-size", side * 2] if side < 4 else []
    codes = tmp_path / "codes"
    tool("tokenize_dataset.py", *models, "--shards", tmp_path / "shards", "--out", codes)
    vqgan = VQGAN.from_pretrained(exports / "vqgan")
    transformer = save_transformer(tmp_path / "gpt", vqgan, condition=codes_condition(second, side))
    given = {"transformer": transformer, "condition_vqgan": tmp_path / "second"}
    found = plan(asked(**given, condition=str(tmp_path / kind)))
    assert found.request.count == found.period == 3
    dataset = CodeDataset.open(str(codes))
    keys = dataset.keys(np.arange(3))
    stored = dataset.samples(range(3), ["cond"])["cond"]
    by_name = torch.stack([stored[keys.index(path.stem)] for path in photographs])
    assert torch.equal(found.columns(range(3))["cond"], by_name)
    assert len(by_name.unique()) > 3


@pytest.fixture
def segmentation(exports: Path, tmp_path: Path) -> dict[str, str]:
    """A transformer that is conditioned on label maps of 3 classes, and their VQGAN."""
    second = save_vqgan(tmp_path / "second", LabelMap(3), 12)
    vqgan = VQGAN.from_pretrained(exports / "vqgan")
    transformer = save_transformer(
        tmp_path / "gpt", vqgan, condition=codes_condition(second), order=SpiralOut()
    )
    return {"transformer": str(transformer), "condition_vqgan": str(tmp_path / "second")}


def label_maps(folder: Path, count: int) -> list[Path]:
    rng = np.random.default_rng(0)
    names = [folder / f"{number}.png" for number in range(count)]
    return [grey_map(name, rng.integers(0, 3, (8, 8)).astype(np.uint8)) for name in names]


def test_a_folder_of_pictures_gives_one_image_each_beside_it(
    asked: Asked, segmentation: dict[str, str], tmp_path: Path
) -> None:
    maps = label_maps(tmp_path / "maps", 12)  # 10 and 11 come after 9
    main(asked(**segmentation, condition=str(tmp_path / "maps")))
    written = json.loads((tmp_path / "o" / "samples.json").read_text())
    assert len(written["images"]) == 12
    assert Image.open(tmp_path / "o" / "grid.png").size == (10 * 8 + 9 * 2, 3 * 8 + 2 * 2)
    made = [Image.open(tmp_path / "o" / f"{number:06d}.png").tobytes() for number in range(12)]
    main(asked(**segmentation, condition=[str(maps[0]), str(maps[1])], n=3, out=tmp_path / "two"))
    again = [Image.open(tmp_path / "two" / f"{number:06d}.png").tobytes() for number in range(3)]
    assert again[:2] == made[:2]
    assert Image.open(tmp_path / "two" / "grid.png").size == (6 * 8 + 5 * 2, 8)


def test_a_picture_in_a_batch_is_what_it_is_alone(
    asked: Asked, segmentation: dict[str, str], tmp_path: Path
) -> None:
    label_maps(tmp_path / "maps", 5)
    found = plan(asked(**segmentation, condition=str(tmp_path / "maps"), n=8))
    together = found.columns(range(8))["cond"]
    assert torch.equal(
        together, torch.cat([found.columns(range(k, k + 1))["cond"] for k in range(8)])
    )
    assert torch.equal(together[5:], together[:3])


def test_a_masked_transformer_and_several_conditions_take_pictures_too(
    asked: Asked, exports: Path, segmentation: dict[str, str], tmp_path: Path
) -> None:
    second = VQGAN.from_pretrained(tmp_path / "second")
    condition = SeveralConditions([ClassCondition(3), codes_condition(second)])
    vqgan = VQGAN.from_pretrained(exports / "vqgan")
    transformer = save_transformer(
        tmp_path / "several", vqgan, condition=condition, scheme=Masked(steps=3)
    )
    (path,) = label_maps(tmp_path / "maps", 1)
    given = segmentation | {"transformer": str(transformer)}
    for condition_, more in ((str(path), {"class_id": 2}), ({"codes": str(path)}, {"class_id": 2})):
        found = plan(asked(**given, condition=condition_, n=3, **more))
        assert found.columns(range(3))["cls"].tolist() == [2, 2, 2]
        assert found.columns(range(3))["cond"].shape == (3, 4, 4)
    main(asked(**given, condition=str(path), n=3, out=tmp_path / "classes"))
    written = json.loads((tmp_path / "classes" / "samples.json").read_text())
    assert [image["class"] for image in written["images"]] == [0, 1, 2]


def test_edges_of_a_photograph_are_found_and_those_of_a_map_are_its_own(
    asked: Asked, exports: Path, tmp_path: Path
) -> None:
    second = save_vqgan(tmp_path / "second", Edges(), 12)
    vqgan = VQGAN.from_pretrained(exports / "vqgan")
    transformer = save_transformer(tmp_path / "gpt", vqgan, condition=codes_condition(second))
    given = {"transformer": transformer, "condition_vqgan": tmp_path / "second"}
    pixels = np.full((16, 16, 3), 255, np.uint8)
    pixels[:, 8:] = 0
    drawing = np.zeros((8, 8), np.uint8)
    drawing[3] = 255
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    grey_map(tmp_path / "drawing.png", drawing)
    (found,) = plan(asked(**given, condition=str(tmp_path / "photo.png"))).given
    edges = found.input(0)[0, 0] > 0
    assert edges[:, 3:5].any(1)[2:-2].all()
    assert not edges[:, [0, 1, 6, 7]].any()
    (found,) = plan(asked(**given, condition=str(tmp_path / "drawing.png"))).given
    assert torch.equal(found.input(0)[0, 0] > 0, torch.from_numpy(drawing > 0))


def test_what_cannot_be_a_condition_is_refused_in_a_line_that_names_it(
    asked: Asked, exports: Path, segmentation: dict[str, str], tmp_path: Path
) -> None:
    (path,) = label_maps(tmp_path / "maps", 1)
    photo = photograph(tmp_path / "photo.jpg")
    outside = grey_map(tmp_path / "outside.png", np.full((8, 8), 7, np.uint8))
    (tmp_path / "text.png").write_text("a holiday")
    (tmp_path / "bomb.png").write_bytes(raw_png(20000, 20000, 8, b""))
    (tmp_path / "empty").mkdir()
    save_vqgan(tmp_path / "other", LabelMap(3), 12)
    save_vqgan(tmp_path / "larger", LabelMap(3), 13)
    other = VQGAN.from_pretrained(tmp_path / "other")
    with torch.no_grad():
        other.quant_conv.bias.add_(1)
    other.save_pretrained(tmp_path / "other")
    one = {"condition": str(path)}
    for settings, message in (
        ({"condition": str(photo)}, r"condition: .*photo.jpg: a map of mode RGB, but one 8-bit"),
        ({"condition": str(outside)}, r"condition: .*outside.png has the class 7, .* 0 to 2"),
        (
            {"condition": str(tmp_path / "text.png")},
            r"condition: .*text.png: the label map is not a JPEG",
        ),
        ({"condition": str(tmp_path / "bomb.png")}, r"condition: .*bomb.png: .*decompression bomb"),
        ({"condition": str(tmp_path / "no.png")}, r"condition: there is no file .*no.png"),
        (one | {"condition_vqgan": ""}, r"condition: .*0.png is a picture, give condition_vqgan"),
        (one | {"condition_vqgan": tmp_path / "larger"}, r"condition_vqgan: .* 13 codes.* with 12"),
        (one | {"condition_vqgan": tmp_path / "other"}, r"condition_vqgan: its fingerprint is .*"),
        ({}, r"condition_vqgan: it encodes pictures, and condition=null names none"),
        (
            {"condition": str(tmp_path / "empty")},
            r"condition_vqgan: .*condition=.*empty names none",
        ),
        (one | {"class_id": 1}, r"class_id: this transformer is not class-conditional"),
        (one | {"transformer": exports / "none"}, r"not conditioned on pictures.*=none"),
    ):
        with pytest.raises(UserError, match=message) as refused:
            main(asked(**segmentation | settings))
        assert len(str(refused.value).splitlines()) == 1
        assert not (tmp_path / "o").exists()
