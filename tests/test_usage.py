"""What a start imports, and what --help says."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from taming_dist.caches import COMPILED, keep_compiled
from taming_dist.stages import schemas
from taming_dist.usage import choices, conf_dir, usage

IMPORTED = """
import sys
sys.argv = ["train", *{words}]
import taming_dist.train
try:
    taming_dist.train.main()
finally:
    slow = ["torch", "torch._dynamo", "triton", "deepspeed", "wandb", "webdataset", "transformers"]
    print("imported", *(name for name in slow if name in sys.modules))
"""


def imported(*words: str) -> tuple[str, list[str]]:
    """What the command prints, and which of the slow libraries it has imported."""
    done = subprocess.run(
        [sys.executable, "-c", IMPORTED.format(words=list(words))],
        capture_output=True,
        text=True,
        check=False,
    )
    *said, last = done.stdout.splitlines()
    return "\n".join(said) + done.stderr, last.split()[1:]


def test_help_lists_every_choice_and_imports_nothing_slow() -> None:
    said, found = imported("--help")
    assert found == []
    assert said == usage().rstrip("\n")
    for experiment in (conf_dir() / "experiment").glob("*.yaml"):
        assert f" {experiment.stem}" in said


def test_a_mistake_in_the_configuration_is_told_before_what_training_takes_is_imported() -> None:
    said, found = imported("+experiment=flickr", "data.sise=3")
    assert "there is no key data.sise" in said
    assert found == ["torch"]


def test_the_choices_of_the_help_are_the_groups_that_hydra_knows() -> None:
    told = {line.partition("=")[0].lstrip("+") for line in choices(conf_dir())}
    # what has no schema of its own is plain YAML
    assert set(schemas()) <= told
    assert told - set(schemas()) == {
        "experiment", "scale", "debug", "speedrun", "comparison", "network", "engine", "log",
        "optim",
    }  # fmt: skip


def test_what_is_compiled_is_kept_in_the_cache_folder_unless_the_user_has_named_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TAMING_DIST_CACHE", str(tmp_path))
    monkeypatch.setenv("TRITON_CACHE_DIR", "elsewhere")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # so that it is as before afterwards
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    keep_compiled()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "inductor")
    assert os.environ["TRITON_CACHE_DIR"] == "elsewhere"
    assert set(COMPILED) == {"TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"}
