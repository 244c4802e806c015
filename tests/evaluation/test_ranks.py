"""The evaluation command on several ranks gives the figures and pictures of one."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from taming_dist.evaluate import main
from tests.engine.ranks import free_port
from tests.test_evaluate import config_for, inputs  # noqa: F401  (a fixture)

pytestmark = pytest.mark.slow


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
        elif name.endswith("_by_position"):
            assert np.allclose(value, other[name], atol=2e-5)
        else:
            assert other[name] == value, name


@pytest.mark.parametrize(("model", "data"), [("vqgan", "images"), ("class", "codes")])
def test_figures_and_pictures_are_those_of_one_rank(
    inputs: Path,  # noqa: F811
    tmp_path: Path,
    model: str,
    data: str,
) -> None:
    settings: dict[str, Any] = {"batch": 2, "pictures": 5}
    if model == "vqgan":
        settings["features"] = "random"
    main(config_for(inputs, tmp_path / "1", model, data, **settings))
    words = [f"{name}={value}" for name, value in settings.items()]
    words += [f"model={inputs / model}", f"data={inputs / data}", f"out={tmp_path / '2'}"]
    told = evaluate(2, *words, "lpips_weights=random", "lpips_net=alex")
    assert "wrote" in told[0]
    assert not any(told[1:])
    one, two = (tmp_path / name for name in ("1", "2"))
    found = [json.loads((out / "metrics.json").read_text()) for out in (one, two)]
    assert_same(*found)
    files = sorted(file.relative_to(one) for file in one.rglob("*.png"))
    assert len(files) == (11 if model == "vqgan" else 0)
    for file in files:
        assert (one / file).read_bytes() == (two / file).read_bytes()
