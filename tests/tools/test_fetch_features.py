"""The tool that fetches a network of timm: its tensors by timm's names, whatever the file holds."""

import hashlib
import io
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from taming_dist.errors import UserError
from taming_dist.timm_networks import timm_model

TOOL = Path(__file__).parents[2] / "tools" / "fetch_features.py"


@pytest.fixture
def tool(opened: Callable[[str], Any]) -> Any:
    return opened("fetch_features")


def archive_of(data: bytes) -> SimpleNamespace:
    """An archive whose one file is `data`."""
    return SimpleNamespace(file="archive", fetch=lambda: b"", member=lambda *_: data)


def saved(tensors: dict[str, torch.Tensor]) -> bytes:
    file = io.BytesIO()
    torch.save(tensors, file)
    return file.getvalue()


@pytest.fixture
def network(tool: Any) -> dict[str, torch.Tensor]:
    """Other weights for the network, under timm's names."""
    torch.manual_seed(0)
    state = timm_model(tool.NETWORK, tool.SIZE).state_dict()
    return {
        name: torch.randn_like(tensor) if tensor.is_floating_point() else tensor
        for name, tensor in state.items()
    }


def test_tensors_under_other_names_are_written_as_timm_names_them(
    tool: Any, network: dict[str, torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = {f"_{k}.{name.split('.')[-1]}": t for k, (name, t) in enumerate(network.items())}
    monkeypatch.setattr(tool, "ARCHIVE", archive_of(saved(theirs)))
    file = tmp_path / "weights" / "features.safetensors"
    with pytest.raises(UserError, match="does not contain the pinned weights"):
        tool.fetch(file)
    assert not file.parent.exists()
    digest = hashlib.sha256(tool.save(tool.named(theirs, network))).hexdigest()
    monkeypatch.setattr(tool, "SHA256", digest)
    assert tool.fetch(file).startswith(f"wrote {file} (network=tf_efficientnet_lite0, path={file}")
    found = load_file(file)
    assert found.keys() == network.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in network.items())
    assert "exists and is correct" in tool.fetch(file)
    file.write_bytes(b"else")
    with pytest.raises(UserError, match="is another file, or damaged"):
        tool.fetch(file)
    assert file.read_bytes() == b"else"


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"no file of torch", "cannot be read"),
        (saved({"a": torch.ones(2)}), "has other tensors than tf_efficientnet_lite0 of timm"),
    ],
    ids=["none", "another"],
)
def test_a_file_that_holds_something_else_is_refused(
    tool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes, said: str
) -> None:
    monkeypatch.setattr(tool, "ARCHIVE", archive_of(data))
    with pytest.raises(UserError, match=said) as told:
        tool.fetch(tmp_path / "file")
    assert "\n" not in str(told.value)
    assert not list(tmp_path.iterdir())


def test_recipes_that_need_the_network_name_the_file_that_is_written(tool: Any) -> None:
    recipes = [
        TOOL.parents[1] / "conf/comparison" / f"{t}.yaml" for t in ("vf", "semantic", "logits")
    ]
    for recipe in recipes:
        text = recipe.read_text()
        assert f"network: {tool.NETWORK}\n" in text
        assert f"path: weights/{tool.NETWORK}.safetensors\n" in text
        assert f"sha256: {tool.SHA256}\n" in text
