"""The tool that fetches FID's Inception: its tensors alone are read, whatever the file holds."""

import hashlib
import io
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from taming_dist.errors import UserError
from taming_dist.inception import classifier_file, kept_classifier


@pytest.fixture
def tool(opened: Callable[[str], Any]) -> Any:
    return opened("fetch_inception")


class Layer(nn.Module):
    """A convolution with the numbers of its norm, named as in the file."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(outputs, inputs, 3, 3))
        for name in ("beta", "mean", "var"):
            self.register_buffer(name, torch.randn(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.conv2d(x, self.weight, self.beta) + self.mean.sum() + self.var.sum()


class Ours(nn.Module):
    """Two convolutions in the same order under the names of torch-fidelity."""

    def __init__(self) -> None:
        super().__init__()
        for name, inputs, outputs in (("first", 3, 4), ("second", 4, 5)):
            block = nn.Module()
            block.conv = nn.Conv2d(inputs, outputs, 3, bias=False)
            block.bn = nn.BatchNorm2d(outputs)
            setattr(self, name, block)


def script() -> tuple[nn.Module, bytes]:
    network = nn.Sequential(Layer(3, 4), Layer(4, 5))
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(network), file)
    return network, file.getvalue()


def test_tensors_of_a_script_are_read_and_named_by_their_order(tool: Any) -> None:
    network, data = script()
    tensors = tool.named(tool.read_script(data), Ours().state_dict())
    assert torch.equal(tensors["second.conv.weight"], network[1].weight)
    assert torch.equal(tensors["first.bn.running_var"], network[0].var)
    assert torch.equal(tensors["first.bn.bias"], network[0].beta)
    assert len(tensors) == 8


def test_another_network_is_refused(tool: Any) -> None:
    _, data = script()
    with pytest.raises(UserError, match="has 8 tensors, not 4"):
        tool.named(tool.read_script(data), {"only.conv.weight": torch.zeros(1)})


def test_what_is_no_tensor_is_refused_unmade(tool: Any) -> None:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("x/data.pkl", pickle.dumps(print))
    with pytest.raises(UserError, match="builtins.print is not allowed"):
        tool.read_script(file.getvalue())
    with pytest.raises(UserError, match="cannot be read"):
        tool.read_script(b"no archive")


def test_the_classifier_is_taken_from_the_file_with_the_published_hash(
    tool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TAMING_DIST_CACHE", str(tmp_path / "cache"))
    assert kept_classifier() is None
    weight = torch.randn(1008, 2048)
    path = tmp_path / "weights.pth"
    torch.save({"fc.weight": weight, "fc.bias": torch.zeros(1008)}, path)
    with pytest.raises(UserError, match=r"weights\.pth is not torch-fidelity's"):
        tool.keep_classifier(path)
    monkeypatch.setattr(
        tool, "CLASSIFIER_SHA256", hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    )
    assert "wrote" in tool.keep_classifier(path)
    found = kept_classifier()
    assert found is not None
    assert torch.equal(found, weight)
    classifier_file().write_bytes(b"damaged")
    with pytest.raises(UserError, match=r"classifier\.safetensors is damaged"):
        kept_classifier()
    with pytest.raises(UserError, match="not a file of plausible size"):
        tool.keep_classifier(tmp_path)


def test_code_in_the_file_of_the_classifier_is_not_run(
    tool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "weights.pth"
    torch.save({"fc.weight": Path("a")}, path)
    monkeypatch.setattr(
        tool, "CLASSIFIER_SHA256", hashlib.sha256(path.read_bytes()).hexdigest()[:8]
    )
    with pytest.raises(UserError, match="holds something other than"):
        tool.keep_classifier(path)
