"""Names that people give to runs and folders reach the entry points as they are typed."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra.core.config_store import ConfigStore

from taming_dist.config import hydra_entry
from taming_dist.evaluate import EvaluateConfig
from taming_dist.sampling.config import SampleConfig
from taming_dist.stages import schemas
from taming_dist.stages.interface import Config
from taming_dist.usage import conf_dir

NAMES = [
    "two words",
    "grö\u00dfe e\u0301",
    "a=b",
    "[list]",
    "(a)",
    "it's",
    'say "hi"',
    "a,b",
    "{a}",
    "{a: b}",
    "a:b",
    "$HOME",
    "%20",
    "#1",
    "back\\slash",
    "-dash",
    "1e3",
    "true",
    "*.?",
    "é,[x]=(y) 'z' \"q\"",
]
Got = Callable[..., Any]


@pytest.fixture
def got(monkeypatch: pytest.MonkeyPatch) -> Got:
    """What an entry point makes of its command line."""

    def run(name: str, schema: type, *words: str, **options: Any) -> Any:
        found: list[Any] = []
        monkeypatch.setattr(sys, "argv", [name, *words])
        hydra_entry(name, schema, found.append, **options)
        return found[0]

    return run


@pytest.mark.parametrize("first", range(0, len(NAMES), 4))
def test_any_name_is_taken_as_it_is_typed(
    got: Got, monkeypatch: pytest.MonkeyPatch, first: int
) -> None:
    one, two, three, four = NAMES[first : first + 4]
    words = ["+experiment=flickr", f"run.name={one}", f"run.dir=some/{two}"]
    words += [f"data.train={three}", f"data.val=/some/{four}/val"]
    trained = got("train", Config, *words, groups=schemas())
    assert (trained.run.name, trained.run.dir) == (one, f"some/{two}")
    assert trained.data.val == f"/some/{four}/val"
    sampled = got("sample", SampleConfig, f"transformer={one}", f"vqgan=/{two}", f"out={three}/a")
    assert (sampled.transformer, sampled.vqgan, sampled.out) == (one, f"/{two}", f"{three}/a")
    # which is a command of its own, where `model` and `data` are no groups
    store = ConfigStore.instance()
    kept = {name: node for name, node in store.repo.items() if name not in ("model", "data")}
    monkeypatch.setattr(store, "repo", kept)
    words = [f"model={one}", f"data=/{two}", f"out={three}/a"]
    measured = got("evaluate", EvaluateConfig, *words, folder=conf_dir() / "evaluate")
    assert (measured.model, measured.data, measured.out) == (one, f"/{two}", f"{three}/a")


def test_what_omegaconf_replaces_is_said_in_a_line(
    got: Got, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        got("sample", SampleConfig, "out=${x}")
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("error: ")
    escaped = got("sample", SampleConfig, r"out=\${x}", "transformer=a", "vqgan=b")
    assert Path(escaped.out) == Path("${x}")
