"""Small transformers and how they are sampled from; as a script, the share of codes in which a
compiled step agrees with the plain one."""

import sys
from typing import Any

import torch

from taming_dist.generation.captured import Captured
from taming_dist.generation.sampler import Sampler
from taming_dist.generation.sampling import Sampling
from taming_dist.models.prior.conditions import ClassCondition
from taming_dist.models.prior.prefix import Prefix
from taming_dist.models.prior.transformer import Transformer, TransformerConfig

PLAIN = Sampling(0.9, top_k=20, top_p=0.95)
GUIDED = Sampling(0.9, top_k=20, guidance=2.0, guidance_schedule="cosine")


def small(block: str, device: str, **settings: Any) -> Transformer:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"layers": 2, "heads": 2, "width": 32, "null_prefix": True}
    condition = ClassCondition(5)
    model = Transformer(
        TransformerConfig(64, [4, 6], block=block, condition=condition, **{**sizes, **settings})
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.3)
    return model.eval().to(device)


def classes(count: int, device: str) -> Prefix:
    return Prefix((torch.arange(count, device=device)[:, None] % 5,))


@torch.no_grad()
def agreeing(device: str) -> float:
    """The share of codes in which a compiled step agrees with the plain one."""
    found = []
    for block, sampling in (("gpt", PLAIN), ("llama", GUIDED)):
        model = small(block, device)
        plain, compiled = Sampler(model, sampling), Sampler(model, sampling, Captured(True))
        for images in (range(8), range(8, 13)):
            prefix = classes(len(images), device)
            codes = compiled.codes(prefix, 3, images) == plain.codes(prefix, 3, images)
            found.append(codes.float().mean().item())
    return min(found)


if __name__ == "__main__":
    print(agreeing(sys.argv[1]))
