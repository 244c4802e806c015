"""SimVQ against its formulas in plain torch, and the rotation trick against a rotation matrix."""

import pytest
import torch
from torch import Tensor

from taming_dist.models.quantizers import SimVQConfig, build_quantizer
from taming_dist.models.quantizers.interface import rotated


def numbers(*size: int, seed: int = 1) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def test_codes_loss_and_gradients_are_those_of_the_formulas() -> None:
    torch.manual_seed(0)
    quantizer = build_quantizer(SimVQConfig(codes=11, dim=3, beta=0.3))
    z = numbers(2, 3, 4, 5).requires_grad_(True)
    out = quantizer(z)
    upstream = numbers(2, 3, 4, 5, seed=2)
    (out.loss + (out.z_q * upstream).sum()).backward()

    state = quantizer.state_dict()
    weight = state["embedding.weight"].clone().requires_grad_(True)
    entries = torch.stack([weight @ row for row in state["embedding.rows"]])
    again = z.detach().clone().requires_grad_(True)
    total, codes = torch.zeros(()), []
    for b in range(2):
        for i in range(4):
            for j in range(5):
                vector = again[b, :, i, j]
                code = min(
                    range(11), key=lambda k: float((vector - entries[k]).detach().square().sum())
                )
                codes.append(code)
                apart = (entries[code] - vector.detach()).square().sum()
                close = (entries[code].detach() - vector).square().sum()
                total = total + (apart + 0.3 * close) / z.numel()
                total = total + (vector * upstream[b, :, i, j]).sum()  # straight through
    total.backward()
    assert out.codes.flatten().tolist() == codes
    assert z.grad is not None
    torch.testing.assert_close(z.grad, again.grad)
    torch.testing.assert_close(quantizer.embedding.weight.grad, weight.grad)


def test_only_the_layer_is_learned_and_moves_codes_that_were_not_chosen() -> None:
    torch.manual_seed(0)
    quantizer = build_quantizer(SimVQConfig(codes=50, dim=3))
    assert [name for name, _ in quantizer.named_parameters()] == ["embedding.weight"]
    before = quantizer.embedding.entries().detach()
    out = quantizer(numbers(1, 3, 1, 1))
    out.loss.backward()
    with torch.no_grad():
        quantizer.embedding.weight -= quantizer.embedding.weight.grad
    moved = (quantizer.embedding.entries() - before).abs().sum(1)
    assert int((out.statistics.counts > 0).sum()) == 1
    assert int((moved > 0).sum()) == 50


def rotation(origin: Tensor, target: Tensor) -> Tensor:
    """The matrix that turns one unit vector to another in their plane, and nothing else."""
    cosine = float(origin @ target)
    across = target - cosine * origin
    across = across / across.norm()
    sine = (1 - cosine**2) ** 0.5
    plane = torch.outer(origin, origin) + torch.outer(across, across)
    turned = cosine * plane
    turned += sine * (torch.outer(across, origin) - torch.outer(origin, across))
    return torch.eye(len(origin), dtype=origin.dtype) - plane + turned


def test_the_rotations_gradient_is_that_of_a_scaled_rotation_matrix() -> None:
    vectors = numbers(6, 4).requires_grad_(True)
    entries, upstream = numbers(6, 4, seed=2), numbers(6, 4, seed=3)
    out = rotated(vectors, entries)
    torch.testing.assert_close(out, entries)
    out.backward(upstream)
    for row in range(6):
        z, q = vectors.detach()[row].double(), entries[row].double()
        turn = q.norm() / z.norm() * rotation(z / z.norm(), q / q.norm())
        torch.testing.assert_close(turn @ z, q)
        assert vectors.grad is not None
        expected = (turn.T @ upstream[row].double()).float()
        torch.testing.assert_close(vectors.grad[row], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [0.0, -1.0, 1.0])
def test_a_vector_without_direction_or_opposite_to_its_entry_has_a_finite_gradient(
    scale: float,
) -> None:
    entries = numbers(3, 4)
    vectors = (scale * entries).requires_grad_(True)
    out = rotated(vectors, entries)
    torch.testing.assert_close(out, entries)
    out.sum().backward()
    assert vectors.grad is not None
    assert vectors.grad.isfinite().all()
