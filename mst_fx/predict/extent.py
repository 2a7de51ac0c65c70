"""Work -> the numbers of its axis that chunk lengths are chosen by."""

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
from mst_fx.recognise.region import Over


@dataclass(frozen=True)
class Extent:
    """The length of a region's axis, and how wide its products are.

    Attributes:
        length: positions of the axis, as captured.
        dynamic: whether the length varies at run time.
        tokens_per_position: rows of the stream at one position: the batch, where the axis is the sequence.
        widest: bytes of the widest product for one position; of the widest value, where there is no product.
        sharing: tokens for each row that one matrix multiplies: 1, or more where experts share the tokens.
        wide: bytes of all widening products for one position.
        cast: bytes of the largest gradient that adds up over the chunks in another dtype than its own.
        over: what a position is: some tokens, or a head with all tokens.
    """

    length: int
    dynamic: bool
    tokens_per_position: int
    widest: int
    sharing: float = 1.0
    wide: int = 0
    cast: int = 0
    over: Over = "tokens"


def extent_of(work: Work, at: Hint, over: Over = "tokens") -> Extent:
    """Return the numbers of a region's axis, with the sizes that `at` tells."""
    stages = work.stages
    products = stages.products
    length = at(stages.length)
    return Extent(
        length=length,
        dynamic=stages.dynamic,
        tokens_per_position=max(1, _tokens(stages, at) // length) if over == "tokens" else _rows(stages, at),
        widest=max((bytes_per_position(stages, node, at) for node in products or stages.loop), default=0),
        sharing=max([1.0, *(_tokens_per_row(stages, node, at) for node in products)]),
        wide=sum(bytes_per_position(stages, node, at) for node in products if not is_sink(stages, node, at)),
        cast=max((_bytes_cast(work, node, at) for node in work.differentiated), default=0),
        over=over,
    )


def _rows(stages: Stages, at: Hint) -> int:
    """Return the rows of the products: each chunk of heads reads all tokens."""
    return max(at(prod(shape_of(node)[:-1])) for node in stages.products)


def _tokens(stages: Stages, at: Hint) -> int:
    """Return the tokens of the stream; its last dim holds the features, or, where it is the axis, a product's does."""
    shape = shape_of(stages.stream)
    features = shape[-1]
    if stages.axis.dim == len(shape) - 1 > 0:
        features = shape_of(factors(stages.products[0])[0])[-1]
    return at(prod(shape)) // at(features)


def _bytes_cast(work: Work, operand: Node, at: Hint) -> int:
    """Return the bytes of the gradient of a whole operand in half precision; 0 for any other operand."""
    value: torch.Tensor = operand.meta["val"]
    adds_up = value.dtype in HALF and work.stages.placement(operand) == WHOLE
    return bytes_of(value, at) if adds_up else 0


def _tokens_per_row(stages: Stages, product: Node, at: Hint) -> float:
    """Return the tokens for each row that one matrix multiplies, where a product has one for each group; else 0."""
    weight = factors(product)[1]
    if stages.placements.of[weight] != WHOLE or len(shape_of(weight)) != 3:
        return 0.0
    rows = at(prod(shape_of(product)[:-1]))
    return shape_of(weight)[0] * at(prod(shape_of(stages.stream)[:-1])) / rows
