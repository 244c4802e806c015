"""The original's permuters: two buffers of a Net2NetTransformer, which say its order of codes.

They count places row by row, as ours do. The indices decide; the YAML file only has to agree.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from taming_dist.errors import UserError
from taming_dist.models.prior.orders import ORDERS, Grid, Order, Raster
from taming_dist.taming_compat.description import class_name, instance

FORWARD, BACKWARD = "forward_shuffle_idx", "backward_shuffle_idx"  # below `permuter.`

# name in ORDERS -> the original's class of permuters; it has none for the others
PERMUTERS = {
    "raster": "Identity",
    "subsample": "Subsample",
    "z_curve": "ZCurve",
    "spiral_in": "SpiralIn",
    "spiral_out": "SpiralOut",
    "random": "Random",
    "alternate": "AlternateParsing",
}
# those that the original has for square grids only, whose sides are a multiple of (0: a power of 2)
MULTIPLES = {"subsample": 0, "z_curve": 0, "spiral_in": 2, "spiral_out": 2}


def import_order(
    permuter: Mapping[str, Tensor], description: Mapping[str, Any], grid: Grid
) -> Order:
    """Return the order of a grid whose indices are in the tensors below `permuter.`.

    Without indices it is the one that the description names, or raster.

    Raises:
        UserError: no order has these indices, or the description names another one.
    """
    named = _named(description)
    if FORWARD not in permuter:
        return named or Raster()
    places = _places(permuter, grid)
    if named is not None:
        if torch.equal(named.places(grid), places):
            return named
        raise UserError(
            f"permuter_config in the YAML file is {PERMUTERS[named.name]}, whose indices are not "
            f"permuter.{FORWARD} of the checkpoint: give the YAML file of this very model"
        )
    for name, kind in ORDERS.items():
        if name in PERMUTERS and torch.equal(kind().places(grid), places):
            return kind()
    raise UserError(
        f"permuter.{FORWARD}: {grid[0]} x {grid[1]} codes in an order that is none of "
        f"{', '.join(PERMUTERS)}: of this checkpoint only the VQGANs can be had, with --only"
    )


def export_order(order: Order, grid: Grid) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the indices of an order under the original's names, and its part of the description.

    Raises:
        UserError: the original has no such order.
    """
    if order.name not in PERMUTERS:
        raise UserError(
            f"model/order={order.name}: the original has no such order, only "
            f"{', '.join(PERMUTERS)}: give the export itself"
        )
    if isinstance(order, Raster):
        return {}, {}
    side = grid[0]
    multiple = MULTIPLES.get(order.name, 1) or 1 << (side.bit_length() - 1)
    if order.name in MULTIPLES and (side != grid[1] or side % multiple):
        raise UserError(
            f"model/order={order.name}: the original has none for {side} x {grid[1]} codes: give "
            f"the export itself"
        )
    places = order.places(grid)
    target = f"taming.modules.transformer.permuter.{PERMUTERS[order.name]}"
    described = {"permuter_config": instance(target, {"H": grid[0], "W": grid[1]})}
    return {FORWARD: places, BACKWARD: places.argsort()}, described


def _named(description: Mapping[str, Any]) -> Order | None:
    """The order whose class the description names; None if it names none."""
    named = class_name(description, "permuter_config")
    if named is None:
        return None
    for name, theirs in PERMUTERS.items():
        if theirs == named:
            return ORDERS[name]()
    raise UserError(
        f"permuter_config: {named} is an order that is unknown here; known are "
        f"{', '.join(PERMUTERS.values())}"
    )


def _places(permuter: Mapping[str, Tensor], grid: Grid) -> Tensor:
    """The places in their order; UserError if the indices are no order of the grid."""
    places = permuter[FORWARD]
    count = grid[0] * grid[1]
    if places.shape != (count,):
        raise UserError(
            f"permuter.{FORWARD} has {places.numel()} places for {grid[0]} x {grid[1]} codes: give "
            f"the model's --resolution"
        )
    inverse = places.argsort()
    if not torch.equal(places[inverse], torch.arange(count)):
        raise UserError(
            f"permuter.{FORWARD} does not have each of {count} places once: it is damaged"
        )
    if not torch.equal(permuter.get(BACKWARD, inverse), inverse):
        raise UserError(f"permuter.{BACKWARD} is not the inverse of {FORWARD}: it is damaged")
    return places
