"""Counts of keys, however they are written: the number of tokens that go to each expert.

    histc(key, n, 0, n - 1)                       (key[..., None] == arange(n)).sum(all dims but the last)
    zeros(.., n).scatter(-1, key, 1).sum(..)      zeros(n).scatter_add(0, key, ones), index_add, index_put

A mask (the first of the second line) marks a key once in each row, so the keys of a row have to be distinct, as those
that a top-k picks are.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node

from mst_fx.core.aten_ops import (
    CASTS,
    COUNTS,
    FILLS,
    FILLS_LIKE,
    GROUPED_PRODUCTS,
    RESHAPES,
    ROW_ADDS,
)
from mst_fx.core.graph_walk import descendants
from mst_fx.core.sizes import sure
from mst_fx.placement.placement import same_shape
from mst_fx.placement.rules.indexing import counts_up
from mst_fx.placement.rules.registry import args_of, argument, shape_of, takes

aten = torch.ops.aten

DISTINCT = "distinct"
"""Key of `meta`: whether no value stands twice in a row of an input of the graph, as is known from what makes it."""
FILLED_WITH: dict[Any, int] = {
    aten.zeros.default: 0,
    aten.new_zeros.default: 0,
    aten.zeros_like.default: 0,
    aten.ones.default: 1,
    aten.new_ones.default: 1,
    aten.ones_like.default: 1,
}


def counted_key(node: Node) -> Node | None:
    """Return what a node counts, if it makes one number for each group; None for a node that counts nothing."""
    if node.target in COUNTS:
        return None if takes_range_from_values(node) else args_of(node)[0]
    if node.target not in (aten.sum.dim_IntList, *ROW_ADDS) or len(shape_of(node)) != 1:
        return None
    return _added_to_zeros(node) if node.target in ROW_ADDS else _summed_marks(node)


def takes_range_from_values(node: Node) -> bool:
    """Return whether an op that counts takes the range of its groups from all values."""
    return bool(argument(node, "min") == argument(node, "max"))


def feeds_groups(counts: Node) -> bool:
    """Return whether counts say where the groups of a grouped product end."""

    def readers(node: Node) -> list[Node]:
        carries = node is counts or node.target in (*CASTS, *RESHAPES, aten.cumsum.default)
        return list(node.users) if carries else []

    return any(node.target in GROUPED_PRODUCTS for node in descendants([counts], readers))


def _summed_marks(node: Node) -> Node | None:
    """Return the key whose marks, one in each row of classes, are summed over all dims but that of the classes."""
    marks, classes = node, 0  # the dim of the classes, which the sums leave
    while marks.target in (aten.sum.dim_IntList, *CASTS):
        source = args_of(marks)[0]
        if marks.target == aten.sum.dim_IntList:
            rank = len(shape_of(source))
            dims = {dim % rank for dim in argument(marks, "dim") or range(rank)}
            left = [dim for dim in range(rank) if dim not in dims]
            if argument(marks, "keepdim") or classes >= len(left):
                return None
            classes = left[classes]
        marks = source
    if marks.target == aten.eq.Tensor:
        return _compared(marks, classes)
    return _marked(marks) if marks.target == aten.scatter.value and classes == len(shape_of(marks)) - 1 else None


def _compared(marks: Node, classes: int) -> Node | None:
    """Return the key that is compared with every class along one dim: with 0, 1, 2, ..."""
    rank = len(shape_of(marks))
    left, right = args_of(marks)[:2]
    for key, numbers in ((left, right), (right, left)):
        if not (isinstance(key, Node) and isinstance(numbers, Node)):
            continue
        own = _padded(key, rank)
        is_range = [sure(size == 1) for size in _padded(numbers, rank)] == [dim != classes for dim in range(rank)]
        while numbers.target in (*RESHAPES, *CASTS):
            numbers = args_of(numbers)[0]
        if is_range and sure(own[classes] == 1) and counts_up(numbers):
            return key
    return None


def _padded(node: Node, rank: int) -> tuple[Any, ...]:
    """Return a shape as it broadcasts to a rank."""
    shape = shape_of(node)
    return (1,) * (rank - len(shape)) + tuple(shape)


def _marked(marks: Node) -> Node | None:
    """Return the key at whose classes a row of zeros has ones; one class may not stand twice in a row."""
    target, dim, key, value = args_of(marks)
    last = len(shape_of(marks)) - 1
    is_mark = value == 1 and dim % (last + 1) == last and _is_filled_with(target, 0)
    return key if is_mark and (sure(shape_of(key)[-1] == 1) or _is_top_k(key)) else None


def _is_top_k(node: Node) -> bool:
    """Return whether the values of each row are indices that a top-k picks, so that none is there twice."""
    while node.target in CASTS:
        node = args_of(node)[0]
    if node.op == "placeholder":
        return bool(node.meta.get(DISTINCT))
    picks = node.target is operator.getitem and args_of(node)[0].target == aten.topk.default
    rank = len(shape_of(node))
    return picks and args_of(node)[1] == 1 and argument(args_of(node)[0], "dim") % rank == rank - 1


@dataclass(frozen=True)
class RowWrite:
    """What an op writes to rows: `target[index] = values`, or `+=` if it accumulates."""

    target: Node
    index: Node
    values: Any
    accumulates: bool


def row_write(node: Node) -> RowWrite | None:
    """Return what an op writes along dim 0; None where it writes along another dim."""
    if node.target == aten.index_put.default:
        target, indices, values, accumulates = args_of(node)[:4]
        index, writes_rows = indices[0], len(indices) == 1 and len(shape_of(indices[0])) == 1
    else:
        target, dim, index, values = args_of(node)[:4]
        adds_rows = node.target == aten.index_add.default
        writes_rows = dim == 0 and (adds_rows or same_shape(shape_of(index), shape_of(values)))
        accumulates = adds_rows or node.target == aten.scatter_add.default
    return RowWrite(target, index, values, accumulates) if writes_rows and isinstance(index, Node) else None


def _added_to_zeros(node: Node) -> Node | None:
    """Return the key along which ones are added to zeros."""
    written = row_write(node)
    if written is None or not written.accumulates or (takes(node, "alpha") and argument(node, "alpha") != 1):
        return None
    return written.index if _is_filled_with(written.target, 0) and _is_filled_with(written.values, 1) else None


def _is_filled_with(value: Any, number: int) -> bool:
    while isinstance(value, Node) and value.target in (*CASTS, *RESHAPES, aten.expand.default):
        value = args_of(value)[0]
    if not isinstance(value, Node) or value.target not in (*FILLS, *FILLS_LIKE):
        return False
    filled = FILLED_WITH.get(value.target)
    return bool((argument(value, "fill_value") if takes(value, "fill_value") else filled) == number)
