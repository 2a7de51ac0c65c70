"""Work -> the numbers of its axis that the length of a mini-sequence is chosen by."""

from __future__ import annotations

from math import prod

import torch
from torch.fx import Node

from mst_fx.analysis import Work
from mst_fx.body import HALF
from mst_fx.chunking import Extent
from mst_fx.lower import bytes_of, hint
from mst_fx.memory import bytes_per_position, is_sink
from mst_fx.placement import WHOLE
from mst_fx.rules import shape_of
from mst_fx.rules.contraction import factors
from mst_fx.stages import Stages


def extent_of(work: Work) -> Extent:
    """Numbers of a region's axis."""
    stages = work.stages
    products = stages.products
    length = hint(stages.length)
    return Extent(
        length=length,
        dynamic=stages.dynamic,
        tokens=max(1, _tokens(stages) // length),
        widest=max((bytes_per_position(stages, node) for node in products or stages.loop), default=0),
        sharing=max([1.0, *(_tokens_per_row(stages, node) for node in products)]),
        wide=sum(bytes_per_position(stages, node) for node in products if not is_sink(stages, node)),
        cast=max((_bytes_cast(work, stages.operands[i]) for i in work.wanted), default=0),
    )


def _tokens(stages: Stages) -> int:
    """Positions of the stream, whose last dim holds their features; where that is the axis, a product tells."""
    shape = shape_of(stages.stream)
    features = shape[-1]
    if stages.axis.dim == len(shape) - 1 > 0:
        features = shape_of(factors(stages.products[0])[0])[-1]
    return hint(prod(shape)) // hint(features)


def _bytes_cast(work: Work, operand: Node) -> int:
    """Of the gradient of an operand in half precision that every chunk reads as a whole."""
    value: torch.Tensor = operand.meta["val"]
    adds_up = value.dtype in HALF and work.stages.placement(operand) == WHOLE
    return bytes_of(value) if adds_up else 0


def _tokens_per_row(stages: Stages, product: Node) -> float:
    """Tokens for each row that one of the product's matrices meets, where it has one for each group; else 0."""
    weight = factors(product)[1]
    if stages.placements.of[weight] != WHOLE or len(shape_of(weight)) != 3:
        return 0.0
    rows = hint(prod(shape_of(product)[:-1]))
    return shape_of(weight)[0] * hint(prod(shape_of(stages.stream)[:-1])) / rows
