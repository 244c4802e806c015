"""Networks of timm: with the weights of the file that is meant, or one line."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from taming_dist.errors import UserError
from taming_dist.timm_networks import blank_timm_network, read_tensors, timm_network
from tests.tiny_timm import save_timm


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return save_timm(tmp_path_factory.mktemp("vit"), "test_vit")


def opened(given: dict[str, str], size: int = 32, **other: str) -> Any:
    given = given | other
    return timm_network(given["network"], given["path"], given["sha256"], size)


def test_a_network_has_the_weights_of_its_file_and_positions_for_its_size(
    vit: dict[str, str],
) -> None:
    state, tensors = opened(vit).network.state_dict(), load_file(vit["path"])
    assert state["pos_embed"].shape == (1, 2 * 2 + 1, 64)  # of 10 x 10 in the file
    assert state.keys() == tensors.keys()
    assert all(torch.equal(state[name], tensors[name]) for name in state if name != "pos_embed")


@pytest.mark.parametrize(("name", "size", "grid"), [("test_vit", 32, 2), ("test_convnext", 64, 2)])
def test_it_stays_frozen_and_in_eval_mode_and_features_are_its_last_map(
    tmp_path: Path, name: str, size: int, grid: int
) -> None:
    found = opened(save_timm(tmp_path, name), size).train()
    assert not any(module.training for module in found.modules())
    assert not any(parameter.requires_grad for parameter in found.parameters())
    images = torch.rand(2, 3, size, size) * 2 - 1
    seen = found.network.forward_features(images)  # its mean and deviation are 0.5
    if seen.dim() == 3:
        seen = seen[:, 1:].transpose(1, 2).unflatten(2, (grid, grid))
    torch.testing.assert_close(found.features(images), seen)
    assert found.features(images).shape == (2, found.width, grid, grid)


def test_grey_images_of_any_size_are_read(vit: dict[str, str]) -> None:
    network, grey = opened(vit), torch.rand(1, 1, 24, 40)
    torch.testing.assert_close(network(grey), network(grey.expand(1, 3, 24, 40)))


def test_a_blank_network_is_the_same_without_memory(vit: dict[str, str]) -> None:
    blank, found = blank_timm_network("test_vit", 32), opened(vit)
    assert all(tensor.is_meta for tensor in blank.parameters())
    assert blank.width == found.width
    shapes = [{n: t.shape for n, t in x.network.state_dict().items()} for x in (blank, found)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
    ("other", "line"),
    [
        ({"network": "test_vat"}, "timm .* has no network test_vat: use test_vit"),
        ({"network": "hf-hub:someone/something"}, "has no network hf-hub:someone/something: use"),
        ({"path": "nowhere.safetensors"}, "nowhere.* of test_vit: there is no such file; it is"),
        ({"sha256": "0" * 64}, "has the SHA-256 [0-9a-f]{64} instead of 0000.*: it is damaged"),
        ({"network": "test_convnext"}, "cannot make test_convnext .* weights are not its own"),
        ({"network": "test_vit2"}, "cannot make test_vit2 .* weights are not its own"),
    ],
)
def test_another_network_or_file_is_one_line(
    vit: dict[str, str], other: dict[str, str], line: str
) -> None:
    with pytest.raises(UserError, match=line) as caught:
        opened(vit, **other)
    assert "\n" not in str(caught.value)


def test_without_timm_the_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UserError, match=r"needs the package timm: pip install .*\[features\]"):
        blank_timm_network("test_vit", 32)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_tensors_are_read_by_name(tmp_path: Path, suffix: str) -> None:
    file, tensors = tmp_path / f"weights{suffix}", {"a": torch.ones(2)}
    save_file(tensors, file) if suffix == ".safetensors" else torch.save(tensors, file)
    assert torch.equal(read_tensors(file)["a"], tensors["a"])


@pytest.mark.parametrize("content", [b"", b"nothing", b"\x80\x02", b"PK\x03\x04", b"8" * 64])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_file_of_anything_else_is_one_line(tmp_path: Path, content: bytes, suffix: str) -> None:
    file = tmp_path / f"weights{suffix}"
    file.write_bytes(content)
    with pytest.raises(UserError, match="holds no tensors") as caught:
        read_tensors(file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [torch.ones(2), [torch.ones(2)], {"a": {"b": torch.ones(2)}}])
def test_tensors_without_names_are_refused(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(UserError, match="something other than tensors by name"):
        read_tensors(tmp_path / "weights.pth")


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    torch.save({"run": print}, tmp_path / "weights.pth")
    with pytest.raises(UserError, match="holds no tensors"):
        read_tensors(tmp_path / "weights.pth")
