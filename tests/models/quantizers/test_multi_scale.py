"""Multi-scale residual quantisation against its algorithm in slow loops, with torch's own area and
bicubic interpolation."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from taming_dist.errors import UserError
from taming_dist.models.quantizers import MultiScaleConfig, build_quantizer
from taming_dist.models.quantizers.interface import rotated
from taming_dist.models.quantizers.multi_scale import shared
from tests.tiny_models import tiny_config

SCALES = [1, 2, 3, 5]


def numbers(*size: int, seed: int = 1) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def built(**settings: Any) -> Any:
    """A quantizer whose entries have lengths of their own."""
    torch.manual_seed(0)
    quantizer = build_quantizer(
        MultiScaleConfig(codes=11, dim=3, **{"scales": SCALES, "beta": 0.3} | settings)
    )
    with torch.no_grad():
        quantizer.embedding.weight.copy_(numbers(11, 3, seed=5))
    return quantizer


def chosen(vector: Tensor, entries: Tensor, normalized: bool) -> int:
    """The nearest entry, or the one of the nearest direction."""
    if normalized:
        return max(range(11), key=lambda k: float(F.cosine_similarity(vector, entries[k], dim=0)))
    return min(range(11), key=lambda k: float((vector - entries[k]).square().sum()))


def slowly(z: Tensor, state: dict[str, Tensor], normalized: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [n], the sum of all entries and the loss of one image's latents [d, i, i]."""
    entries, last = state["embedding.weight"], SCALES[-1]
    codes, total, loss = [], torch.zeros_like(z), torch.zeros(())
    for k, side in enumerate(SCALES):
        rest = F.interpolate((z - total).detach()[None], (side, side), mode="area")[0]
        own = torch.empty(side, side, dtype=torch.int64)
        for i in range(side):
            for j in range(side):
                own[i, j] = chosen(rest[:, i, j], entries.detach(), normalized)
        codes += own.flatten().tolist()
        grid = entries[own].permute(2, 0, 1)[None]
        grid = F.interpolate(grid, (last, last), mode="bicubic")
        weight, bias = state[f"phis.{k}.weight"], state[f"phis.{k}.bias"]  # as many as scales here
        total = total + (0.5 * grid + 0.5 * F.conv2d(grid, weight, bias, padding=1))[0]
        apart = (total - z.detach()).square().mean()
        loss = loss + (apart + 0.3 * (z - total.detach()).square().mean()) / len(SCALES)
    return torch.tensor(codes), total, loss


@pytest.mark.parametrize("normalized", [False, True])
def test_codes_sum_loss_and_gradients_are_those_of_the_algorithm(normalized: bool) -> None:
    quantizer = built(normalized=normalized)
    z, upstream = numbers(2, 3, 5, 5).requires_grad_(True), numbers(2, 3, 5, 5, seed=2)
    out = quantizer(z)
    (out.loss + (out.z_q * upstream).sum()).backward()

    state = {name: value.clone() for name, value in quantizer.state_dict().items()}
    for value in state.values():
        value.requires_grad_(True)
    again = z.detach().clone().requires_grad_(True)
    found = [slowly(image, state, normalized) for image in again]
    loss = sum(each[2] for each in found) / 2
    (loss + (again * upstream).sum()).backward()  # straight through
    assert torch.equal(out.codes, torch.stack([each[0] for each in found]))
    torch.testing.assert_close(out.z_q, torch.stack([each[1] for each in found]).detach())
    torch.testing.assert_close(out.loss, loss)
    torch.testing.assert_close(z.grad, again.grad)
    for name, parameter in quantizer.named_parameters():
        torch.testing.assert_close(parameter.grad, state[name].grad)


def test_the_rotation_turns_latents_to_the_sum_of_all_scales() -> None:
    quantizer = built(gradient="rotation")
    z, upstream = numbers(2, 3, 5, 5).requires_grad_(True), numbers(2, 3, 5, 5, seed=2)
    out = quantizer(z)
    (out.z_q * upstream).sum().backward()
    again = z.detach().clone().requires_grad_(True)
    rows = again.movedim(1, -1).flatten(0, 2)
    turned = rotated(rows, quantizer.lookup(out.codes).movedim(1, -1).flatten(0, 2))
    (turned * upstream.movedim(1, -1).flatten(0, 2)).sum().backward()
    torch.testing.assert_close(z.grad, again.grad)


def test_codes_are_a_sequence_of_all_scales_and_each_image_is_looked_up_alone() -> None:
    quantizer = built()
    assert quantizer.config.code_shape(5, 5) == (1 + 4 + 9 + 25,)
    assert quantizer.config.latent_grid((39,)) == (5, 5)
    codes = torch.randint(11, (2, 39), generator=torch.Generator().manual_seed(0))
    one, other = quantizer.lookup(codes), quantizer.lookup(codes[:1])
    torch.testing.assert_close(one[:1], other)


def test_codes_of_the_first_scales_make_the_sum_up_to_them() -> None:
    quantizer = built()
    stages = list(quantizer._stages(numbers(2, 3, 5, 5)))
    codes = quantizer.encode(numbers(2, 3, 5, 5))
    for stage, end in zip(stages, (1, 5, 14, 39), strict=True):
        torch.testing.assert_close(quantizer.lookup(codes[:, :end]), stage.total)
    with pytest.raises(RuntimeError):
        quantizer.lookup(codes[:, :4])  # of half a scale


def test_scales_share_few_convolutions_as_the_authors_do() -> None:
    assert shared(10, 4) == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3]
    assert shared(1, 1) == [0]
    for count in range(1, 20):
        used = shared(count, min(4, count))
        assert used == sorted(used)
        assert set(used) == set(range(min(4, count)))  # none without a gradient


@pytest.mark.parametrize(
    ("scales", "line"),
    [
        ([2, 4], r"scales=\[2, 4\]: use ascending sides from 1"),
        ([1, 3, 3], r"scales=\[1, 3, 3\]: use ascending sides from 1"),
        ([], r"scales=\[\]: use one or more whole numbers"),
        ([1, 2, 8], r"scales=\[1, 2, 8\]: they end with 8, but images of that size have 4 x 4"),
    ],
)
def test_scales_that_do_not_fit_are_refused_by_name(scales: list[int], line: str) -> None:
    with pytest.raises(UserError, match=rf"model\.quantizer\.{line}"):
        tiny_config(MultiScaleConfig(codes=4, dim=2, scales=scales))


def test_more_scales_learn_to_leave_less_of_the_latents() -> None:
    z, losses = numbers(8, 3, 5, 5), []
    for scales in ([1, 5], SCALES):
        quantizer = built(scales=scales)
        optimizer = torch.optim.Adam(quantizer.parameters(), lr=0.03)
        for _ in range(60):
            optimizer.zero_grad()
            quantizer(z).loss.backward()
            optimizer.step()
        losses.append(float(F.mse_loss(quantizer(z).z_q, z)))
    assert losses[-1] < losses[0] < float(z.square().mean())
