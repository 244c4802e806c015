"""The terms of the reconstruction loss; `losses.reconstruction` adds up those that are chosen.

A term is a module and its config class in a file here, its line in `TERMS`, and a YAML file of its
name in conf/loss/terms/.
"""

from taming_dist.losses.terms.gram import GramConfig
from taming_dist.losses.terms.logits import LogitsConfig
from taming_dist.losses.terms.perceptual import PerceptualConfig
from taming_dist.losses.terms.pixels import L1Config, L2Config
from taming_dist.losses.terms.published import PublishedConfig
from taming_dist.losses.terms.semantic import SemanticConfig
from taming_dist.losses.terms.term import Networks, ProjectedTerm, TermConfig
from taming_dist.losses.terms.vf import VFConfig

__all__ = [
    "TERMS",
    "GramConfig",
    "L1Config",
    "L2Config",
    "LogitsConfig",
    "Networks",
    "PerceptualConfig",
    "ProjectedTerm",
    "PublishedConfig",
    "SemanticConfig",
    "TermConfig",
    "VFConfig",
]

# name in conf/loss/terms -> its config class
TERMS: dict[str, type[TermConfig]] = {
    "l1": L1Config,
    "l2": L2Config,
    "perceptual": PerceptualConfig,
    "gram": GramConfig,
    "logits": LogitsConfig,
    "vf": VFConfig,
    "semantic": SemanticConfig,
}
