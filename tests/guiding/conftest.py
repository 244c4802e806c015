"""A tiny VQGAN, and encoders whose best picture is known."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from taming_dist.guiding.objective import Objective
from taming_dist.guiding.optimise import Guidance, Optimisation, Settings
from taming_dist.guiding.variables import VARIABLES, Codebook
from taming_dist.guiding.views import Views
from taming_dist.models.quantizers import VectorQuantizerConfig
from taming_dist.models.vqgan import VQGAN
from tests.tiny_models import tiny_config

CODES, FACTOR = 27, 2


class MeanColour:
    """An `ImageTextModel` that sees of a picture its mean colour alone, as a direction in space;
    a text is one of three numbers. So it is satisfied where the colours have these proportions."""

    size, mean, std, fingerprint = 8, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0), "colours"

    def encode_image(self, pictures: Tensor) -> Tensor:
        return pictures.mean((2, 3))

    def encode_text(self, tokens: Tensor) -> Tensor:
        return tokens.float()

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        return torch.tensor([[int(word) for word in text.split()] for text in texts])

    def is_cut(self, text: str) -> bool:
        return False


class Palette(VQGAN):
    """A VQGAN whose decoder paints each code's colour on its pixels: 3 channels of the latents."""

    def decoded(self, z: Tensor) -> tuple[Tensor, Tensor]:
        images = torch.nn.functional.interpolate(z, scale_factor=float(FACTOR))
        return images, images.detach()

    def decode_codes(self, codes: Tensor) -> Tensor:
        return self.decoded(self.quantize.lookup(codes))[0]


def tiny(kind: type[VQGAN] = VQGAN, dim: int = 3) -> VQGAN:
    """An untrained VQGAN of 2 pixels per code whose entries are all colours of three levels."""
    torch.manual_seed(0)
    config = tiny_config(VectorQuantizerConfig(codes=CODES, dim=dim), latent_channels=32)
    model = kind(config).eval().requires_grad_(False)
    levels = torch.tensor([-0.8, 0.0, 0.8])
    model.quantize.embedding.weight.copy_(torch.cartesian_prod(levels, levels, levels))
    return model


Made = Callable[..., Optimisation]


@pytest.fixture(params=sorted(VARIABLES))
def made(request: pytest.FixtureRequest) -> Made:
    """An optimisation of each variable toward a colour, of a picture of 8 x 12 pixels."""

    def make(
        vqgan: VQGAN | None = None,
        model: Any = None,
        toward: Sequence[str] = ("9 1 1",),
        weights: Sequence[float] = (1.0,),
        seed: int = 0,
        strength: float = 0.0,
        **settings: Any,
    ) -> Optimisation:
        vqgan, model = vqgan or tiny(Palette), model or MeanColour()
        generator = torch.Generator().manual_seed(seed)
        codebook = Codebook.of(vqgan.quantize, torch.device("cpu"))
        codes = torch.randint(CODES, (4, 6), generator=generator)
        targets = model.encode_text(model.tokenize(toward))
        views = Views(model.size, 4, strength=strength)
        guidance = Guidance(model, views, Objective.of(targets, weights))
        variable = VARIABLES[request.param](codebook, codes)
        chosen = Settings(**{"steps": 60, "lr": 0.2} | settings)
        return Optimisation(vqgan, variable, guidance, chosen, generator)

    return make


@pytest.fixture(scope="session")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export folder of a tiny VQGAN."""
    folder = tmp_path_factory.mktemp("vqgan")
    tiny().save_pretrained(folder)
    return folder
