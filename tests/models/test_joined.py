"""Layers that are computed as one are those that they were apart, and are stored as those."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from taming_dist.models.export import read_fingerprint
from taming_dist.models.joined import (
    JoinedLinear,
    as_computed,
    as_stored,
    stored_parameters,
)
from taming_dist.models.prior.transformer import Transformer, TransformerConfig

NAMES = ("key", "query", "value")
GOLDEN = Path(__file__).parents[1] / "golden" / "transformer_gpt.pt"
# that of the golden weights at a commit that computed the three apart
FINGERPRINT = "115114d42e60433d527db2b91b6ec49a6b74d56f43c052ba76d3f44e913288a1"


class Around(nn.Module):
    """What the layers are beside."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.joined, self.other = JoinedLinear(width, NAMES), nn.Linear(width, width)


def some(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def module() -> Around:
    return Around(16)


def apart(module: Around) -> dict[str, Tensor]:
    """Copies of each layer's tensors that gradients reach."""
    state = as_stored(module, module.state_dict())
    return {name: tensor.clone().requires_grad_() for name, tensor in state.items()}


@pytest.mark.parametrize(("precision", "error"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("last", [False, True], ids=["the same", "one layer reads other positions"])
def test_values_and_gradients_are_those_of_the_layers_apart(
    module: Around, precision: torch.dtype, error: float, last: bool
) -> None:
    layers, x = apart(module), some(2, 40, 16).requires_grad_()
    reads = (x, x[:, -1:] if last else x, x)
    with torch.autocast("cpu", precision, enabled=precision != torch.float32):
        found = module.joined(*reads)
        expected = [
            F.linear(read, layers[f"{name}.weight"], layers[f"{name}.bias"])
            for name, read in zip(NAMES, reads, strict=True)
        ]
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=error, atol=error)
    upstream = [some(*theirs.shape, seed=1).to(theirs.dtype) for theirs in expected]
    joined = [module.joined.weight, module.joined.bias]
    gradients = torch.autograd.grad(found, [x, *joined], upstream)
    parts = [[layers[f"{name}.{kind}"] for name in NAMES] for kind in ("weight", "bias")]
    plain = torch.autograd.grad(expected, [x, *parts[0], *parts[1]], upstream)
    theirs = (plain[0], torch.cat(plain[1:4]), torch.cat(plain[4:]))
    for mine, wanted in zip(gradients, theirs, strict=True):
        torch.testing.assert_close(mine, wanted, rtol=error, atol=error * wanted.abs().max().item())


def test_a_state_has_each_layer_by_its_name_and_goes_back(module: Around) -> None:
    stored = as_stored(module, module.state_dict())
    names = [f"{name}.{kind}" for kind in ("weight", "bias") for name in NAMES]
    assert list(stored) == [*names, "other.weight", "other.bias"]
    assert [part.name for part in stored_parameters(module)] == list(stored)
    assert torch.equal(stored["query.weight"], module.joined.weight[16:32])
    back = as_computed(module, stored)
    assert back.keys() == module.state_dict().keys()
    assert all(torch.equal(back[name], tensor) for name, tensor in module.state_dict().items())
    del stored["key.bias"]  # what is not whole stays, and is told of by whoever loads it
    assert {"query.bias", "value.bias"} <= as_computed(module, stored).keys()


def test_an_export_has_the_tensors_and_the_fingerprint_of_versions_that_computed_them_apart(
    tmp_path: Path,
) -> None:
    golden = torch.load(GOLDEN, weights_only=True)
    sizes = golden["config"]
    config = TransformerConfig(
        vocabulary=sizes["vocab_size"],
        grid=[5, 8],
        block_size=sizes["block_size"],
        layers=sizes["n_layer"],
        heads=sizes["n_head"],
        width=sizes["n_embd"],
    )
    model = Transformer(config)
    model.load_state_dict({"pos_emb": torch.zeros_like(model.pos_emb)} | golden["weights"])
    assert model.fingerprint == FINGERPRINT
    model.save_pretrained(tmp_path)
    there = load_file(tmp_path / "model.safetensors")
    assert there.keys() == golden["weights"].keys() | {"pos_emb"}
    assert all(torch.equal(there[name], tensor) for name, tensor in golden["weights"].items())
    assert read_fingerprint(str(tmp_path)) == FINGERPRINT
    assert Transformer.from_pretrained(tmp_path).fingerprint == FINGERPRINT
