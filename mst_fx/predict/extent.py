"""Work -> the numbers of its axis that the length of a mini-sequence is chosen by."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch.fx import Node

from mst_fx.bodies.work import Work
from mst_fx.core.sizes import Hint
from mst_fx.core.values import HALF, bytes_of
from mst_fx.placement.partition import Stages
from mst_fx.placement.placement import WHOLE
from mst_fx.placement.rules import shape_of
from mst_fx.placement.rules.contraction import factors
from mst_fx.predict.region_memory import bytes_per_position, is_sink


@dataclass(frozen=True)
class Extent:
    """The axis of a region, and how wide its products are.

    Attributes:
        length: positions of the axis, as captured.
        dynamic: whether the length may be another at run time.
        tokens: rows of the stream behind one position: the batch, where the axis is the sequence.
        widest: bytes that the widest product (or value, where there is none) holds for one position.
        sharing: tokens for each row that a matrix meets: 1, or more where tokens are shared out among experts.
        wide: bytes that all of its widening products hold for one position.
        cast: bytes of the largest gradient that adds up over the chunks in another dtype than its own.
    """

    length: int
    dynamic: bool
    tokens: int
    widest: int
    sharing: float = 1.0
    wide: int = 0
    cast: int = 0


def extent_of(work: Work, at: Hint) -> Extent:
    """Numbers of a region's axis, of the lengths that `at` tells."""
    stages = work.stages
    products = stages.products
    length = at(stages.length)
    return Extent(
        length=length,
        dynamic=stages.dynamic,
        tokens=max(1, _tokens(stages, at) // length),
        widest=max((bytes_per_position(stages, node, at) for node in products or stages.loop), default=0),
        sharing=max([1.0, *(_tokens_per_row(stages, node, at) for node in products)]),
        wide=sum(bytes_per_position(stages, node, at) for node in products if not is_sink(stages, node, at)),
        cast=max((_bytes_cast(work, stages.operands[i], at) for i in work.wanted), default=0),
    )


def _tokens(stages: Stages, at: Hint) -> int:
    """Positions of the stream, whose last dim holds their features; where that is the axis, a product tells."""
    shape = shape_of(stages.stream)
    features = shape[-1]
    if stages.axis.dim == len(shape) - 1 > 0:
        features = shape_of(factors(stages.products[0])[0])[-1]
    return at(prod(shape)) // at(features)


def _bytes_cast(work: Work, operand: Node, at: Hint) -> int:
    """Of the gradient of an operand in half precision that every chunk reads as a whole."""
    value: torch.Tensor = operand.meta["val"]
    adds_up = value.dtype in HALF and work.stages.placement(operand) == WHOLE
    return bytes_of(value, at) if adds_up else 0


def _tokens_per_row(stages: Stages, product: Node, at: Hint) -> float:
    """Tokens for each row that one of the product's matrices meets, where it has one for each group; else 0."""
    weight = factors(product)[1]
    if stages.placements.of[weight] != WHOLE or len(shape_of(weight)) != 3:
        return 0.0
    rows = at(prod(shape_of(product)[:-1]))
    return shape_of(weight)[0] * at(prod(shape_of(stages.stream)[:-1])) / rows
