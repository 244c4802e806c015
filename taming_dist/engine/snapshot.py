"""What a rank has of an engine at one moment, in memory of its own: training goes on meanwhile."""

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from taming_dist.engine.pieces import Piece, write_pieces
from taming_dist.engine.written import Written, write_file
from taming_dist.formats.strict_json import json_safe

SCALARS = "state.json"  # beside the tensors of an engine


@dataclass(frozen=True)
class Snapshot:
    """The pieces that a rank writes, and on the first one the `scalars` of the engine (None on the
    others). `not_finite`: a tensor that has numbers on some rank that are not finite, or None;
    `difference`: in words, one that is not the same on all ranks as it should be, or None."""

    pieces: list[Piece]
    scalars: dict[str, Any] | None
    rank: int
    world_size: int
    not_finite: str | None = None
    difference: str | None = None

    def write(self, folder: Path) -> dict[str, Written]:
        """Write it into an engine's folder; gives the files of this rank by name."""
        folder.mkdir(parents=True, exist_ok=True)
        files = write_pieces(folder, self.pieces, self.rank, self.world_size)
        if self.scalars is not None:
            text = json.dumps(json_safe(self.scalars), indent=1, allow_nan=False)
            files[SCALARS] = write_file(folder / SCALARS, [f"{text}\n".encode()])
        return files


def not_finite(pieces: Iterable[Piece]) -> str | None:
    """The name of a tensor that has numbers that are not finite, or None. The host waits once for
    each device, and nothing of the tensors' size is made there."""
    names, bounds = defaultdict(list), defaultdict(list)
    for name, _, values in pieces:
        if values.is_floating_point() and values.numel():
            names[values.device].append(name)
            bounds[values.device].append(bounds_of(values))
    for device, each in bounds.items():
        fine = torch.stack(each).isfinite().all(1).tolist()
        if not all(fine):
            return names[device][fine.index(False)]
    return None


def bounds_of(values: Tensor) -> Tensor:
    """The least and the largest number [2] of a tensor; NaN if one is NaN."""
    return torch.stack(values.detach().aminmax()).float()
