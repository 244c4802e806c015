"""Real runs of stage 2 with all that is drawn: orders, dropped conditions, noise, dropout."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from taming_dist.formats.code_shards import CodeShard, write_codes_manifest
from taming_dist.models.prior.transformer import Transformer

pytestmark = pytest.mark.slow
WORKER = Path(__file__).with_name("prior_runs.py")
SAMPLES, CODES, GRID, CLASSES = 12, 24, (3, 4), 3


def write_codes(folder: Path) -> None:
    facts = {
        "vocab": CODES,
        "tokenizer": {"fingerprint": "f" * 64},
        "source": {"fingerprint": "e" * 64, "range": [0, SAMPLES], "bad": []},
        "preprocessing": {"size": 16},
    }
    shard = CodeShard(
        facts,
        codes=np.random.default_rng(0).integers(0, CODES, (SAMPLES, 1, *GRID), dtype=np.uint16),
        sources=np.arange(SAMPLES),
        keys=[str(number) for number in range(SAMPLES)],
        classes=np.arange(SAMPLES, dtype=np.int32) % CLASSES,
    )
    folder.mkdir()
    shard.save(folder / "codes-000000.tar")
    write_codes_manifest(folder, ["codes-000000.tar"], None)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the run directories `whole` and `parts`, which was killed and resumed."""
    folder = tmp_path_factory.mktemp("prior")
    write_codes(folder / "codes")
    environment = {name: value for name, value in os.environ.items() if name != "RANK"}
    done = subprocess.run(
        [sys.executable, str(WORKER), str(folder)],
        env=environment | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "outputs"


def lines(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_a_run_killed_after_it_kept_its_best_model_ends_as_an_undisturbed_one_to_the_bit(
    runs: Path,
) -> None:
    whole, parts = (
        [
            {k: v for k, v in line.items() if k != "time" and not k.startswith("throughput/")}
            for line in lines(runs / name / "metrics.jsonl")
        ]
        for name in ("whole", "parts")
    )
    assert parts == whole
    assert [line["step"] for line in whole if "val/nll" in line] == [2, 4, 6, 8]
    assert [line["step"] for line in whole if "train/nll" in line] == list(range(1, 9))
    for export in ("export", "export-best"):
        one, other = (Transformer.from_pretrained(runs / n / export) for n in ("whole", "parts"))
        assert one.fingerprint == other.fingerprint


def test_the_best_export_is_of_the_step_with_the_lowest_loss(runs: Path) -> None:
    for name in ("whole", "parts"):
        validated = [line for line in lines(runs / name / "metrics.jsonl") if "val/nll" in line]
        best = min(validated, key=lambda line: line["val/nll"])
        told = [line for line in lines(runs / name / "events.jsonl") if line["event"] == "best"]
        assert (told[-1]["step"], told[-1]["value"]) == (best["step"], best["val/nll"])
        assert len(validated[0]["val/nll_by_position"]) == GRID[0] * GRID[1]


def test_the_null_prefix_has_learned(runs: Path) -> None:
    trained = Transformer.from_pretrained(runs / "whole" / "export")
    torch.manual_seed(23)  # the experiment's
    assert trained.null_emb is not None
    assert not torch.equal(trained.null_emb, Transformer(trained.config).null_emb)


def test_the_undisturbed_run_was_profiled(runs: Path) -> None:
    """Its numbers are those of the other one, which was not: see above."""
    table = (runs / "whole" / "profile" / "rank-0.txt").read_text()
    assert "aten::" in table
    assert len(table.splitlines()) == 12
