"""The evaluation command on several ranks gives the figures and pictures of one."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from taming_dist.evaluate import EvaluateConfig, main
from tests.engine.ranks import free_port
from tests.evaluation.test_image_sets import pictures, shards_of
from tests.evaluation.test_samples import models  # noqa: F401  (a fixture)
from tests.test_evaluate import inputs  # noqa: F401  (a fixture)

pytestmark = pytest.mark.slow
ALIKE = {"features": "random", "lpips_weights": "random", "lpips_net": "alex", "batch": 2}


def evaluate(ranks: int, *words: str) -> list[str]:
    """What each rank prints."""
    shared = os.environ | {"OMP_NUM_THREADS": "1", "WORLD_SIZE": str(ranks)}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", "taming_dist.evaluate", *words],
            env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    told = [process.communicate() for process in started]
    assert all(process.returncode == 0 for process in started), told
    return [out for out, _ in told]


def assert_same(one: dict[str, Any], other: dict[str, Any]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        if isinstance(value, float):
            assert other[name] == pytest.approx(value, rel=1e-4, abs=1e-7), name
        elif isinstance(value, list) and any(isinstance(each, float) for each in value):
            found = [np.array(each, dtype=float) for each in (value, other[name])]
            assert np.allclose(*found, rtol=1e-4, atol=2e-5, equal_nan=True), name
        elif name == "nearest":
            found = [[row["numbers"] for row in rows] for rows in (value, other[name])]
            assert found[0] == found[1]
        else:
            assert other[name] == value, name


def assert_ranks_agree(tmp_path: Path, settings: dict[str, Any], monkeypatch: Any) -> list[Path]:
    """The pictures of one rank, which are those of two and four, whose figures are alike, too."""
    one = tmp_path / "1"
    for ranks in (1, 2, 4):
        out = tmp_path / str(ranks)
        monkeypatch.setenv("TAMING_DIST_CACHE", str(tmp_path / f"cache-{ranks}"))
        asked = ALIKE | settings | {"out": str(out)}
        if ranks == 1:
            main(EvaluateConfig(**asked))
            files = sorted(file.relative_to(one) for file in one.rglob("*.png"))
            continue
        told = evaluate(ranks, *(f"{name}={value}" for name, value in asked.items()))
        assert "wrote" in told[0]
        assert not any(told[1:])
        assert_same(*(json.loads((each / "metrics.json").read_text()) for each in (one, out)))
        for file in files:
            assert (one / file).read_bytes() == (out / file).read_bytes()
    return files


def test_reconstructions_are_those_of_one_rank(
    inputs: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = {"model": str(inputs / "vqgan"), "data": str(inputs / "images"), "pictures": 5}
    assert len(assert_ranks_agree(tmp_path, settings, monkeypatch)) == 2 * 5 + 1


def test_distances_of_classes_are_those_of_one_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, seed in (("made", 0), ("real", 1)):
        shards_of(tmp_path / name, pictures(seed), [seed, 1 - seed, 1] * 3)
    settings = {"images": str(tmp_path / "made"), "reference": str(tmp_path / "real"), "size": 24}
    assert_ranks_agree(tmp_path, settings, monkeypatch)
    found = json.loads((tmp_path / "2" / "metrics.json").read_text())
    assert found["images_by_class"] == [3, 6] == found["reference_images_by_class"]
    assert found["fid_by_class"][0] is None
    assert found["fid_by_class"][1] > 0


def test_likelihoods_samples_and_nearest_images_are_those_of_one_rank(
    models: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = {"model": "transformer", "data": "codes", "vqgan": "vqgan"}
    names |= {"reference": "images", "training": "images"}
    settings = {name: str(models / place) for name, place in names.items()}
    pictures = assert_ranks_agree(tmp_path, settings | {"n": 7, "examined": 3}, monkeypatch)
    assert pictures == [Path("nearest.png")]
