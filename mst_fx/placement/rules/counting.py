"""Counts of keys, however they are written: the number of tokens that go to each expert.

    histc(key, n, 0, n - 1)                       (key[..., None] == arange(n)).sum(all dims but the last)
    zeros(.., n).scatter(-1, key, 1).sum(..)      zeros(n).scatter_add(0, key, ones), index_add, index_put
    zeros(.., n).scatter_add(-1, key, ones).sum(..)      stack([(key == 0).sum(), (key == 1).sum(), ...])

Marks (what the sums add up) may have their dims moved, merged and parted. A mask (the first of the second line) marks a
key once in each row, so the keys of a row have to be distinct, as those that a top-k picks are.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
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
    JOINS,
    PERMUTES,
    RESHAPES,
    ROW_ADDS,
)
from mst_fx.core.graph_walk import ancestors, descendants
from mst_fx.core.sizes import sure
from mst_fx.placement.placement import Split, same_shape
from mst_fx.placement.rules.indexing import counts_up
from mst_fx.placement.rules.registry import Spans, args_of, argument, demands_of, shape_of, takes

aten = torch.ops.aten
PLAIN_SUMS = (aten.sum.default, aten.sum.dim_IntList)

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
    if len(shape_of(node)) != 1:
        return None
    if node.target in ROW_ADDS:
        return _added_to_zeros(node)
    if node.target in JOINS:
        return _compared_one_by_one(node)
    return _summed_marks(node) if node.target in PLAIN_SUMS else None


def made_for_counts(nodes: Iterable[Node]) -> set[Node]:
    """Return what each chunk makes of its own keys to count them: the values between these and counts for groups."""
    found = set[Node]()
    for node in nodes:
        key = counted_key(node)
        if key is not None and feeds_groups(node):
            found |= descendants([_unviewed(key)]) & ancestors([node])
    return found


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
    marks, classes, is_mask = node, Split(0), False
    while marks.target in (*PLAIN_SUMS, *CASTS, *RESHAPES, *PERMUTES):
        is_mask = is_mask or (marks.target in CASTS and marks.meta["val"].dtype == torch.bool)
        if is_mask and marks.target in PLAIN_SUMS:
            return None  # more than one becomes one
        try:
            ((marks, classes),) = demands_of(marks, classes).items()
        except Spans:
            return None
    if (classes.outer, classes.inner) != (1, 1) or not sure(shape_of(marks)[classes.dim] == shape_of(node)[0]):
        return None
    if marks.target == aten.eq.Tensor:
        return _compared(marks, classes.dim)
    if marks.target not in (aten.scatter_add.default, aten.scatter.value, aten.scatter.src):
        return None
    return _marked(marks) if argument(marks, "dim") % len(shape_of(marks)) == classes.dim else None


def _compared_one_by_one(joined: Node) -> Node | None:
    """Return the key that is compared with 0, 1, 2, ..., and each comparison summed by itself."""
    keys = []
    for number, part in enumerate(args_of(joined)[0]):
        if not all(sure(size == 1) for size in shape_of(part)):
            return None
        while part.target in (*PLAIN_SUMS, *CASTS, *RESHAPES) and part.meta["val"].dtype != torch.bool:
            part = args_of(part)[0]
        if part.target != aten.eq.Scalar or args_of(part)[1] != number:
            return None
        keys.append(args_of(part)[0])
    return keys[0] if len(set(map(_unviewed, keys))) == 1 else None


def _unviewed(node: Node) -> Node:
    """Return the value that a node is, before reshapes and casts."""
    while node.target in (*RESHAPES, *CASTS):
        node = args_of(node)[0]
    return node


def _compared(marks: Node, classes: int) -> Node | None:
    """Return the key that is compared with every class along one dim: with 0, 1, 2, ..."""
    rank = len(shape_of(marks))
    left, right = args_of(marks)[:2]
    for key, numbers in ((left, right), (right, left)):
        if not (isinstance(key, Node) and isinstance(numbers, Node)):
            continue
        own = _padded(key, rank)
        is_range = [sure(size == 1) for size in _padded(numbers, rank)] == [dim != classes for dim in range(rank)]
        if is_range and sure(own[classes] == 1) and counts_up(_unviewed(numbers)):
            return key
    return None


def _padded(node: Node, rank: int) -> tuple[Any, ...]:
    """Return a shape as it broadcasts to a rank."""
    shape = shape_of(node)
    return (1,) * (rank - len(shape)) + tuple(shape)


def _marked(marks: Node) -> Node | None:
    """Return the key at whose classes a row of zeros has ones, or has them added to it.

    Where they are written, one class may not stand twice in a row.
    """
    target, dim, key, value = args_of(marks)
    if not _is_filled_with(target, 0) or not (value == 1 or _is_filled_with(value, 1)):
        return None
    rows_are_last = dim % len(shape_of(marks)) == len(shape_of(marks)) - 1
    is_once = rows_are_last and (sure(shape_of(key)[-1] == 1) or _is_top_k(key))
    return key if is_once or marks.target == aten.scatter_add.default else None


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
