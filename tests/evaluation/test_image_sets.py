"""Given images against a reference: what may be given, what is kept, and how it refuses."""

import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from taming_dist.errors import UserError
from taming_dist.evaluate import EvaluateConfig, main
from taming_dist.evaluation import image_sets, progress, reference
from taming_dist.evaluation.comparison import side_by_side
from taming_dist.evaluation.distribution import distances, frechet
from taming_dist.inception import inception
from tests.data.shard_files import writing_shards

SIZE, COUNT = 24, 9


def pictures(seed: int, side: int = SIZE) -> np.ndarray:
    """Images uint8 [n, h, w, 3]."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256 - 40 * seed, (COUNT, 4, 4, 3), dtype=np.uint8)
    sized = [Image.fromarray(image).resize((side, side)) for image in coarse]
    return np.stack([np.asarray(image) for image in sized])


def png(image: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "PNG")
    return file.getvalue()


def folder_of(folder: Path, images: np.ndarray) -> str:
    for number, image in enumerate(images):
        place = folder / f"class-{number % 2}"
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number}.png").write_bytes(png(image))
    return str(folder)


def npz_of(file: Path, images: np.ndarray) -> str:
    np.savez_compressed(file, arr_0=images)
    return str(file)


def shards_of(folder: Path, images: np.ndarray, classes: Sequence[int] | None = None) -> str:
    with writing_shards(folder, "val", 4) as write:
        for number, image in enumerate(images):
            label = {} if classes is None else {"cls": str(classes[number]).encode()}
            write(f"{number:04d}", {"png": png(image)} | label)
    return str(folder)


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same images in each form, and others."""
    place = tmp_path_factory.mktemp("sets")
    folder_of(place / "folder", pictures(0))
    npz_of(place / "array.npz", pictures(0))
    shards_of(place / "shards", pictures(0))
    folder_of(place / "other", pictures(1))
    features = inception("random")(torch.from_numpy(pictures(1)).permute(0, 3, 1, 2)).double()
    mu, sigma = features.mean(0).numpy(), features.T.cov().numpy()
    np.savez(place / "statistics.npz", mu=mu, sigma=sigma)
    np.savez(place / "both.npz", mu=mu, sigma=sigma, arr_0=pictures(0))
    return place


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAMING_DIST_CACHE", str(tmp_path / "cache"))


def evaluated(out: Path, **settings: Any) -> dict[str, Any]:
    main(EvaluateConfig(**({"features": "random", "batch": 4, "out": str(out)} | settings)))
    return json.loads((out / "metrics.json").read_text())


def compared(sets: Path, out: Path, images: str, reference: str, **more: Any) -> dict[str, Any]:
    return evaluated(out, images=str(sets / images), reference=str(sets / reference), **more)


def figures(record: dict[str, Any]) -> dict[str, float]:
    protocol, *_ = record["protocols"]
    return {name: record[name] for name in protocol["figures"]}


def test_figures_are_the_same_in_whatever_form_the_images_are(sets: Path, tmp_path: Path) -> None:
    made, real = (
        inception("random")(torch.from_numpy(pictures(seed)).permute(0, 3, 1, 2)) for seed in (0, 1)
    )
    expected = distances(made, real)
    assert expected["fid"] > 0.1
    for number, name in enumerate(("folder", "array.npz", "shards")):
        size = {"size": SIZE} if name == "shards" else {}
        found = compared(sets, tmp_path / str(number), name, "other", **size)
        assert figures(found) == pytest.approx(expected, rel=1e-4, abs=1e-7), name
        protocol, *_ = found["protocols"]
        assert (protocol["images"], protocol["reference_images"]) == (COUNT, COUNT)
        assert (protocol["size"], protocol["crop"]) == (SIZE, "centre")


def test_a_set_has_no_distance_from_itself(sets: Path, tmp_path: Path) -> None:
    found = compared(sets, tmp_path, "folder", "array.npz")
    assert found["fid"] == pytest.approx(0, abs=1e-3)
    assert found["precision"] == found["recall"] == found["coverage"] == 1


def test_statistics_alone_give_fid_and_beside_images_they_decide_it(
    sets: Path, tmp_path: Path
) -> None:
    direct = compared(sets, tmp_path / "direct", "folder", "other")
    alone = compared(sets, tmp_path / "alone", "folder", "statistics.npz")
    both = compared(sets, tmp_path / "both", "folder", "both.npz")
    assert list(figures(alone)) == ["fid"]
    assert alone["fid"] == pytest.approx(direct["fid"], rel=1e-4)
    assert both["fid"] == pytest.approx(direct["fid"], rel=1e-4)
    assert both["precision"] == 1  # of the file's own images, which are those of the folder
    hashes = {each["protocols"][0]["hash"] for each in (direct, alone, both)}
    assert len(hashes) == 3


def test_features_of_a_reference_are_kept_by_what_is_in_it(
    sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[str] = []
    honest = reference.features_of

    def counting(source: Any, *rest: Any) -> dict[str, torch.Tensor]:
        counted.append(source.key)
        return honest(source, *rest)

    monkeypatch.setattr(reference, "features_of", counting)
    folder_of(tmp_path / "changing", pictures(1))
    sets_of = {"images": str(sets / "array.npz"), "reference": str(tmp_path / "changing")}
    first = evaluated(tmp_path / "1", **sets_of)
    assert evaluated(tmp_path / "2", **sets_of)["fid"] == first["fid"]
    assert len(counted) == 1
    for kept in (tmp_path / "cache" / "references").iterdir():
        kept.write_bytes(b"damaged")
    assert evaluated(tmp_path / "3", **sets_of)["fid"] == first["fid"]
    (tmp_path / "changing" / "class-0" / "0.png").write_bytes(png(pictures(0)[0]))
    changed = evaluated(tmp_path / "4", **sets_of)
    assert len(counted) == 3
    assert changed["fid"] != first["fid"]
    assert changed["protocols"][0]["hash"] != first["protocols"][0]["hash"]


def test_where_both_sets_have_classes_each_has_its_distance(sets: Path, tmp_path: Path) -> None:
    images = [np.concatenate([pictures(seed), pictures(seed + 2)]) for seed in (0, 1)]
    classes = [0, 2] * COUNT, [2] * COUNT + [0] * COUNT
    places = ("made", "real")
    for place, some, labels in zip(places, images, classes, strict=True):
        shards_of(tmp_path / place, some, labels)
    found, again = (
        evaluated(
            tmp_path / out,
            images=str(tmp_path / "made"),
            reference=str(tmp_path / "real"),
            size=SIZE,
        )
        for out in ("out", "again")  # whose reference is kept
    )
    assert found["fid_by_class"] == again["fid_by_class"]
    assert found["images_by_class"] == [COUNT, 0, COUNT] == found["reference_images_by_class"]
    network = inception("random")
    for number, value in enumerate(found["fid_by_class"]):
        if number == 1:
            assert value is None
            continue
        parts = [
            network(torch.from_numpy(some[np.array(labels) == number]).permute(0, 3, 1, 2))
            for some, labels in zip(images, classes, strict=True)
        ]
        assert value == pytest.approx(frechet(*parts), rel=1e-4)
    by_name = {name: each for each in found["protocols"] for name in each["figures"]}
    assert "class_counts" not in by_name["fid"]
    assert by_name["fid_by_class"]["hash"] != by_name["fid"]["hash"]

    shards_of(tmp_path / "uneven", images[0], [0] * 10 + [2] * 8)
    uneven = evaluated(
        tmp_path / "uneven-out",
        images=str(tmp_path / "uneven"),
        reference=str(tmp_path / "real"),
        size=SIZE,
    )
    others = {name: each for each in uneven["protocols"] for name in each["figures"]}
    assert others["fid"]["hash"] == by_name["fid"]["hash"]
    assert others["fid_by_class"]["hash"] != by_name["fid_by_class"]["hash"]
    with pytest.raises(UserError, match=r"fid_by_class of .* differ in class_counts"):
        side_by_side([tmp_path / "out", tmp_path / "uneven-out"])
    plain = compared(sets, tmp_path / "plain", "folder", str(tmp_path / "real"))
    assert "fid_by_class" not in plain


def test_a_score_that_is_left_out_is_explained(
    sets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = compared(sets, tmp_path / "few", "folder", "other")
    assert "inception_score" not in found
    assert "no inception_score: it needs 10 images, not 9" in capsys.readouterr().out
    network = inception("random")
    network.classifier = None
    monkeypatch.setattr(image_sets, "inception", lambda _: network)
    found = compared(sets, tmp_path / "none", "folder", "other")
    assert "inception_score" not in found
    assert "no inception_score: the network's classifier is not kept" in capsys.readouterr().out


def test_both_sets_report_their_progress(
    sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "PERIOD_S", 0)
    compared(sets, tmp_path, "folder", "array.npz")
    said = [line.partition(",")[0] for line in capsys.readouterr().err.splitlines()]
    counts = (4, 8, 9)
    assert said == [f"{key}: {n} images" for key in ("images", "reference") for n in counts]


def test_a_larger_reference_is_cut_to_the_size_of_the_images(sets: Path, tmp_path: Path) -> None:
    large = pictures(1, side=2 * SIZE)
    folder_of(tmp_path / "large", large)
    cut = [Image.fromarray(image).resize((SIZE, SIZE), Image.Resampling.LANCZOS) for image in large]
    folder_of(tmp_path / "cut", np.stack([np.asarray(image) for image in cut]))
    found = [
        compared(tmp_path, tmp_path / f"{name}-out", str(sets / "folder"), name)
        for name in ("large", "cut")
    ]
    assert found[0]["fid"] == pytest.approx(found[1]["fid"], rel=1e-4)


def test_a_folder_whose_name_looks_like_a_picture_is_none(sets: Path, tmp_path: Path) -> None:
    folder_of(tmp_path / "images", pictures(0))
    (tmp_path / "images" / "more.png").mkdir()
    assert compared(sets, tmp_path / "out", str(tmp_path / "images"), "folder")["fid"] < 1e-3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, r"model=... is missing: give model=EXPORT data=SHARDS, or images="),
        ({"images": "folder"}, r"reference=... is missing: a folder of pictures, an npz"),
        ({"images": "folder", "reference": "other", "features": "none"}, "features=none: images"),
        ({"images": "folder", "reference": "other", "model": "x"}, "model: given images need none"),
        ({"images": "nothing.npz", "reference": "other"}, "images: there is no file .*nothing.npz"),
        ({"images": "nowhere", "reference": "other"}, "images: there is no .*nowhere"),
        ({"images": "array.npy", "reference": "other"}, "images: .*array.npy is no set of images"),
        ({"images": "folder", "reference": "other", "precision": "fp8"}, "precision=fp8: use fp32"),
        ({"images": "statistics.npz", "reference": "other"}, "statistics.npz has no arr_0"),
        ({"images": "damaged.npz", "reference": "other"}, "damaged.npz is no npz file, or damaged"),
        ({"images": "place.npz", "reference": "other"}, "place.npz is no npz file, or damaged"),
        ({"images": "secret.npz", "reference": "other"}, "secret.npz is no npz .* encrypted"),
        ({"images": "foreign.npz", "reference": "other"}, "foreign.npz is no npz file, or damaged"),
        ({"images": "folder", "reference": "small.npz"}, r"mu and sigma .* are \[3\] and \[3, 3\]"),
        ({"images": "shards", "reference": "other"}, "images: images of shards are cut .* size="),
        ({"images": "mixed", "reference": "other"}, "images: .*24x24.* 12x12: give size="),
        ({"images": "broken", "reference": "other"}, "images: .*0.png cannot be read: "),
        ({"images": "empty", "reference": "other"}, "images: .*empty has no pictures"),
        ({"images": "folder", "reference": "few"}, "2 images are too few to be compared, use 6"),
    ],
)
def test_mistakes_are_one_line(
    sets: Path, tmp_path: Path, settings: dict[str, str], message: str
) -> None:
    (tmp_path / "damaged.npz").write_bytes((sets / "array.npz").read_bytes()[:-100])
    (tmp_path / "place.npz").mkdir()
    (tmp_path / "array.npy").touch()
    for name, offset, value in (("secret.npz", 6, 1), ("foreign.npz", 8, 99)):  # flags, compression
        data = bytearray((sets / "array.npz").read_bytes())
        for mark, further in ((b"PK\x03\x04", 0), (b"PK\x01\x02", 2)):  # the same in both headers
            data[data.index(mark) + offset + further] = value
        (tmp_path / name).write_bytes(data)
    np.savez(tmp_path / "small.npz", mu=np.zeros(3), sigma=np.eye(3))
    folder_of(tmp_path / "mixed", pictures(0)[:1])
    (tmp_path / "mixed" / "z.png").write_bytes(png(pictures(0, side=12)[0]))
    folder_of(tmp_path / "broken", pictures(0)[:1])
    (tmp_path / "broken" / "class-0" / "0.png").write_bytes(b"nothing")
    folder_of(tmp_path / "few", pictures(0)[:2])
    (tmp_path / "empty").mkdir()
    given = {}
    for name, value in settings.items():
        place = tmp_path if (tmp_path / value).exists() else sets
        given[name] = str(place / value) if name in ("images", "reference") else value
    with pytest.raises(UserError, match=message):
        evaluated(tmp_path / "out", **given)
    assert not (tmp_path / "out" / "metrics.json").exists()
