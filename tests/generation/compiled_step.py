"""The compiled step for test_captured.py: writes, as JSON, the codes that it and the plain step
give, the elements of its longest loop, and those of a layer's keys."""

import json
import re

import torch
from torch._inductor import config as inductor
from torch._inductor.utils import run_and_get_code

from taming_dist.generation.captured import Captured
from taming_dist.generation.sampler import Sampler
from taming_dist.generation.sampling import Sampling
from taming_dist.models.prior.conditions import CodesCondition
from taming_dist.models.prior.prefix import Prefix
from taming_dist.models.prior.transformer import Transformer, TransformerConfig

SAMPLING, IMAGES = Sampling(0.9, 10, 0.95), range(2)
LOOP = re.compile(r"x\d+<static_cast<int64_t>\((\d+)L\)")


@torch.no_grad()
def main() -> None:
    inductor.force_disable_caches = True  # what is taken from there has no code to look at
    torch.manual_seed(0)
    condition = CodesCondition(7, [1, 3])
    config = TransformerConfig(
        24, [3, 4], 512, layers=2, heads=2, width=16, condition=condition, condition_table="own"
    )
    model, captured = Transformer(config).eval(), Captured(compiled=True)
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape) * 0.3)
    prefix = Prefix((torch.arange(6).view(2, 3),))
    plain = Sampler(model, SAMPLING).codes(prefix, 3, IMAGES)
    write = Sampler(model, SAMPLING, captured).codes
    compiled, codes = run_and_get_code(write, prefix, 3, IMAGES)
    (recorded,) = captured._kept.values()
    found = {
        "plain": plain.tolist(),
        "compiled": compiled.tolist(),
        "longest": max(int(count) for code in codes for count in LOOP.findall(code)),
        "layer": recorded.cache.keys[0].numel(),
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
