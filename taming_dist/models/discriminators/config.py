"""What the config classes of all discriminators have."""

import dataclasses
from typing import ClassVar


@dataclasses.dataclass
class DiscriminatorConfig:
    """Base of the config classes. `reads_images`: the trained network reads images, rather than
    frozen features of them."""

    reads_images: ClassVar[bool] = True

    def check_size(self, size: int) -> None:
        """UserError if images of so many pixels across will not do."""

    def check_channels(self, channels: int) -> None:
        """UserError if images of so many channels will not do."""
