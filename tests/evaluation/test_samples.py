"""Samples that are measured on the fly: those of the sampling command, and what is said of them."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from taming_dist import sample
from taming_dist.errors import UserError
from taming_dist.evaluate import EvaluateConfig, main
from taming_dist.formats.code_shards import CodeShard, write_codes_manifest
from taming_dist.models.prior.conditions import ClassCondition
from taming_dist.models.prior.transformer import Transformer, TransformerConfig
from taming_dist.models.vqgan import VQGAN
from taming_dist.sampling.config import SampleConfig
from tests.data.shard_files import writing_shards
from tests.test_evaluate import VOCABULARY, inputs, write_images  # noqa: F401

GRID, SIDE, CLASSES = (4, 4), 32, 3


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, inputs: Path) -> Path:  # noqa: F811
    """The VQGAN, a transformer on square grids of its codes, such codes, and images."""
    place = tmp_path_factory.mktemp("models")
    (place / "vqgan").symlink_to(inputs / "vqgan")
    (place / "images").symlink_to(inputs / "images")
    fingerprint = VQGAN.from_pretrained(inputs / "vqgan").fingerprint
    torch.manual_seed(1)
    transformer = Transformer(
        TransformerConfig(
            vocabulary=VOCABULARY,
            grid=list(GRID),
            layers=1,
            heads=2,
            width=8,
            condition=ClassCondition(CLASSES),
            vqgan_fingerprint=fingerprint,
        )
    )
    with torch.no_grad():  # so that classes differ
        for parameter in transformer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    transformer.save_pretrained(place / "transformer")
    codes = np.random.default_rng(0).integers(0, VOCABULARY, (7, 1, *GRID), dtype=np.uint16)
    shard = CodeShard(
        {
            "vocab": VOCABULARY,
            "tokenizer": {"fingerprint": fingerprint},
            "source": {"fingerprint": "e" * 64, "range": [0, 7], "bad": []},
            "preprocessing": {"size": SIDE},
        },
        codes=codes,
        sources=np.arange(7),
        keys=[str(number) for number in range(7)],
        classes=np.arange(7, dtype=np.int32) % 2,  # of three: the last does not occur
    )
    (place / "codes").mkdir()
    shard.save(place / "codes" / "codes-val-000000.tar")
    write_codes_manifest(place / "codes", ["codes-val-000000.tar"], None)
    return place


def evaluated(out: Path, **settings: Any) -> dict[str, Any]:
    known = {"features": "random", "lpips_net": "alex", "lpips_weights": "random", "batch": 4}
    main(EvaluateConfig(**(known | settings | {"out": str(out)})))
    return json.loads((out / "metrics.json").read_text())


def test_they_are_measured_as_if_they_had_been_written(models: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"top_k": 4, "seed": 3, "batch": 4, "n": 6}
    images = str(models / "images")
    asked: dict[str, Any] = {"reference": images, "training": images}
    asked |= {"examined": 2, "neighbours": 3}
    vqgan, transformer = str(models / "vqgan"), str(models / "transformer")
    direct, written = tmp_path / "direct", tmp_path / "written"
    codes = str(models / "codes")
    found = evaluated(direct, model=transformer, data=codes, vqgan=vqgan, **asked, **settings)
    assert (found["images"], found["samples"]) == (7, 6)
    said = found["sampling"]
    assert (said["seed"], said["top_k"], said["top_p"], said["guidance"]) == (3, 4, None, 1.0)

    out = str(tmp_path / "samples")
    sample.main(SampleConfig(transformer=transformer, vqgan=vqgan, out=out, **settings))
    (tmp_path / "samples" / "grid.png").unlink()
    again = evaluated(written, images=out, **asked)
    assert again["images"] == 6
    for name in ("fid", "kid", "precision", "density", "nearest_lpips"):
        assert again[name] == pytest.approx(found[name], rel=1e-4, abs=1e-7), name
    hashes = [
        {name: each["hash"] for each in record["protocols"] for name in each["figures"]}
        for record in (found, again)
    ]
    assert hashes[0]["fid"] == hashes[1]["fid"] != hashes[0]["nearest_lpips"]
    assert (direct / "nearest.png").read_bytes() == (written / "nearest.png").read_bytes()
    with Image.open(direct / "nearest.png") as picture:
        assert picture.size == (4 * SIDE + 3 * 2, 2 * SIDE + 2)


def test_the_likelihood_of_each_class_is_that_of_its_images(models: Path, tmp_path: Path) -> None:
    found = evaluated(
        tmp_path, model=str(models / "transformer"), data=str(models / "codes"), batch=3
    )
    by_class = found["val_nll_by_class"]
    assert len(by_class) == CLASSES - 1
    assert (4 * by_class[0] + 3 * by_class[1]) / 7 == pytest.approx(found["val_nll"], abs=1e-4)
    assert abs(by_class[0] - by_class[1]) > 1e-3
    assert found["val_images_by_class"] == [4, 3]
    bits = GRID[0] * GRID[1] * by_class[0] / (3 * SIDE**2 * np.log(2))
    assert found["val_bits_per_dim_by_class"][0] == pytest.approx(bits, abs=1e-4)


def test_samples_of_a_class_are_compared_with_images_of_it(models: Path, tmp_path: Path) -> None:
    generator = np.random.default_rng(2)
    images = generator.integers(0, 256, (24, SIDE, SIDE, 3), dtype=np.uint8)
    with writing_shards(tmp_path / "real", "val", 8) as write:
        for number, image in enumerate(images):
            file = io.BytesIO()
            Image.fromarray(image).save(file, "PNG")
            write(f"{number:04d}", {"png": file.getvalue(), "cls": str(number % CLASSES).encode()})
    asked = {"model": str(models / "transformer"), "data": str(models / "codes"), "n": 18}
    asked |= {"vqgan": str(models / "vqgan"), "reference": str(tmp_path / "real"), "seed": 3}
    found = evaluated(tmp_path / "all", **asked)
    assert found["images_by_class"] == [6, 6, 6]
    assert found["reference_images_by_class"] == [8, 8, 8]
    assert len(set(found["fid_by_class"])) == CLASSES

    names = {"transformer": asked["model"], "vqgan": asked["vqgan"], "out": str(tmp_path / "made")}
    sample.main(SampleConfig(**names, n=18, seed=3, batch=4, format="shards"))
    sets = {"images": names["out"], "reference": asked["reference"], "size": SIDE}
    written = evaluated(tmp_path / "written", **sets)
    assert written["fid_by_class"] == pytest.approx(found["fid_by_class"], rel=1e-4)
    hashes = [
        {name: each["hash"] for each in record["protocols"] for name in each["figures"]}
        for record in (found, written)
    ]
    assert hashes[0]["fid_by_class"] == hashes[1]["fid_by_class"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"n": 6, "reference": "images"}, "vqgan=... is missing: the export that decodes"),
        ({"n": 6, "vqgan": "vqgan"}, "reference=... is missing"),
        ({"vqgan": "vqgan"}, "vqgan: it is for samples: give n="),
        ({"reference": "images"}, "reference: it is for samples: give n="),
        ({"n": 6, "vqgan": "vqgan", "reference": "images", "guidance": 2.0}, "guidance: 2.0 needs"),
        ({"n": 6, "vqgan": "vqgan", "reference": "images", "top_p": 1.5}, "top_p=1.5"),
    ],
)
def test_mistakes_are_one_line(
    models: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    paths = {
        name: str(models / settings[name]) for name in ("vqgan", "reference") if name in settings
    }
    model, data = str(models / "transformer"), str(models / "codes")
    with pytest.raises(UserError, match=message):
        evaluated(tmp_path / "out", model=model, data=data, **(settings | paths))
    assert not (tmp_path / "out").exists()
