"""The optimisation, where its best picture is known."""

import pytest
import torch
from torch import Tensor

from taming_dist.guiding.optimise import DTYPES, Settings, clamped

from .conftest import Made, MeanColour, tiny


def final(optimisation: object) -> tuple[list[float], Tensor]:
    """All losses, and the picture at the end."""
    losses = [loss.item() for loss in optimisation.steps()]  # type: ignore[attr-defined]
    return losses, optimisation.picture()  # type: ignore[attr-defined]


def test_a_picture_is_led_to_the_one_colour_that_is_asked_for(made: Made) -> None:
    """9:1:1 is exactly the reddest entry, (0.8, -0.8, -0.8), as colours in [0, 1]."""
    losses, picture = final(made(steps=300, lr=0.5))
    assert losses[0] > 0.1
    assert losses[-1] < 5e-3
    reddest = torch.tensor([229, 26, 26])[:, None, None]
    assert (picture.int() - reddest).abs().amax(0).le(1).float().mean() > 0.6


def test_a_negative_weight_leads_away(made: Made) -> None:
    _, picture = final(made(weights=[-1.0], steps=100))
    red, green, blue = picture.float().mean((1, 2))
    assert red < 60
    assert max(green, blue) > 150


def test_a_pull_keeps_a_picture_as_it_began(made: Made) -> None:
    begun = made().picture()
    free, held = (final(made(pull=pull, steps=80, lr=0.05))[1] for pull in (0.0, 50.0))
    changed = [(picture != begun).any(0).float().mean() for picture in (free, held)]
    assert changed[1] < changed[0] / 2


def test_the_same_seed_gives_the_same_bits_and_another_another_picture(made: Made) -> None:
    """Whatever the global generator of random numbers has given before."""
    torch.manual_seed(1)
    vqgan = tiny()
    first = final(made(vqgan, steps=4, strength=1.0))
    torch.manual_seed(2)
    again = final(made(vqgan, steps=4, strength=1.0))
    assert first[0] == again[0]
    assert first[1].equal(again[1])
    other = final(made(vqgan, steps=4, strength=1.0, seed=1))
    assert not first[1].equal(other[1])


def test_through_a_whole_decoder_the_loss_falls(made: Made) -> None:
    losses, _ = final(made(tiny(), steps=120, lr=0.5, toward=["2 1 1"]))
    assert sum(losses[-9:]) < 0.9 * sum(losses[:9])


class Network(MeanColour):
    """One that has weights, for autocast to cast."""

    def __init__(self) -> None:
        self.layer = torch.nn.Linear(3, 3, bias=False).requires_grad_(False)
        self.layer.weight.copy_(torch.eye(3))
        self.seen: list[torch.dtype] = []

    def encode_image(self, pictures: Tensor) -> Tensor:
        found = self.layer(pictures.mean((2, 3)))
        self.seen.append(found.dtype)
        return found


@pytest.mark.parametrize("precision", DTYPES)
def test_the_image_encoder_computes_in_the_precision_that_is_asked_for(
    made: Made, precision: str
) -> None:
    model = Network()
    losses, _ = final(made(model=model, precision=precision, steps=100))
    assert set(model.seen) == {DTYPES[precision]}
    assert losses[-1] < 5e-3


def test_the_temperature_sinks_by_the_same_factor_in_each_step() -> None:
    settings = Settings(3, 0.1, temperature=1.0, final_temperature=0.01)
    found = [settings.temperature_at(step) for step in range(3)]
    assert found == pytest.approx([1.0, 0.1, 0.01])
    assert Settings(1, 0.1).temperature_at(0) == 1.0


def test_colours_out_of_range_get_the_gradient_that_leads_back_and_no_other() -> None:
    images = torch.tensor([-2.0, -2.0, 0.5, 2.0, 2.0], requires_grad=True)
    found = clamped(images)
    assert found.tolist() == [-1, -1, 0.5, 1, 1]
    found.backward(torch.tensor([1.0, -1.0, 3.0, 1.0, -1.0]))
    assert images.grad is not None
    assert images.grad.tolist() == [0, -1, 3, 1, 0]
