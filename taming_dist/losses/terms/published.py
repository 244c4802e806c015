"""What the terms have in common that stand on a network of timm: how it is found and checked."""

import dataclasses

from taming_dist.errors import UserError
from taming_dist.losses.frozen import FrozenNetwork
from taming_dist.losses.terms.term import Networks, TermConfig
from taming_dist.ranges import marked


@dataclasses.dataclass
class PublishedConfig(TermConfig):
    """`network`: the name of the network and of its weights in timm; `path`: the file with these,
    .safetensors or of `torch.save`; `sha256`: what the file is known by, in hexadecimal."""

    network: str = ""
    path: str = marked("", may_change=True)  # a place
    sha256: str = ""

    def check(self, key: str) -> None:
        super().check(key)
        if not self.path:
            raise UserError(
                f"{key}.path: give the file with the weights of {self.network} (the "
                f"model.safetensors of timm/{self.network} on the Hugging Face hub)"
            )
        if not self.sha256:
            raise UserError(
                f"{key}.sha256: give the SHA-256 that {self.path} should have (the hub shows it "
                f"beside the file, sha256sum {self.path} what it is here)"
            )

    def opened(self, networks: Networks, size: int) -> FrozenNetwork:
        """The network, for images of `size` pixels across."""
        return networks.timm_network(self.network, self.path, self.sha256, size)
