"""Gathers and look-ups along another dim than the split one."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from mst_fx.placement import WHOLE, Placement, Split, number, sure
from mst_fx.rules.registry import Demand, Flow, args_of, back, mixed, rule, shape_of

aten = torch.ops.aten


@rule(aten.gather.default)
def gather(node: Node, flow: Flow) -> Placement:
    """Operand and index are split alike, along another dim; or the index alone, along the dim of the look-up."""
    source: Any
    index: Any
    source, dim, index = args_of(node)[:3]
    a, b = flow.of(source), flow.of(index)
    split = a if isinstance(a, Split) else b
    if not isinstance(split, Split):
        return WHOLE
    if split.dim == dim % len(shape_of(source)):
        if a == WHOLE:
            return split
        raise _rows_of(node, split, source, index, b)
    if shape_of(source)[split.dim] != shape_of(index)[split.dim]:
        raise mixed(node, "has fewer indices than rows")
    for operand, placement in ((source, a), (index, b)):
        if placement == WHOLE:
            raise Demand(operand, split)
        if placement != split:
            raise mixed(node, f"combines values split as {a} and {b}")
    return split


@back(aten.gather.default)
def gather_back(node: Node, split: Split) -> dict[Node, Split]:
    """The index lies as the result; so does the operand, but along the dim of the look-up."""
    source, dim, index = args_of(node)[:3]
    along = split.dim == dim % len(shape_of(source))
    return {index: split} if along else {source: split, index: split}


@rule(aten.index.Tensor)
def index(node: Node, flow: Flow) -> Placement:
    """A whole table and split indices of its rows; or a table that is split along another dim."""
    source, indices = args_of(node)[:2]
    rows: Any = indices[0]
    table = flow.of(source)
    if all(flow.of(i) == WHOLE for i in (source, *indices)):
        return WHOLE
    if len(indices) > 1 or rows is None:
        raise mixed(node, "has several indices, or one of another dim than the first")
    if table == WHOLE:
        return flow.of(rows)
    if not isinstance(table, Split) or table.dim == 0:
        raise _rows_of(node, table, source, rows, flow.of(rows))
    if flow.of(rows) != WHOLE:
        raise mixed(node, "combines a split table with split indices")
    return table.moved(table.dim + len(shape_of(rows)) - 1)


@back(aten.index.Tensor)
def index_back(node: Node, split: Split) -> dict[Node, Split]:
    """The rows that the indices pick, or another dim of the table."""
    source, (rows, *_) = args_of(node)[:2]
    added = len(shape_of(rows)) - 1
    return {rows: split} if split.dim <= added else {source: split.moved(split.dim - added)}


def _rows_of(node: Node, table: Placement, source: Any, rows: Any, picked: Placement) -> Exception:
    """What to raise where rows are picked from the split dim: only an order of the rows may do so."""
    single = len(shape_of(rows)) == 1 or shape_of(rows)[1:] == shape_of(source)[1:]
    if isinstance(table, Split) and table.dim == 0 and picked == WHOLE and single:
        picks, tokens = shape_of(rows)[0], shape_of(source)[0]
        each = number(picks // tokens)
        if each and sure(picks % tokens == 0):
            return Demand(rows, Split(0, table.outer, table.inner * each))
    return mixed(node, "picks rows of the split dim")


@rule(aten.embedding.default)
def look_up(node: Node, flow: Flow) -> Placement:
    """A whole table, split indices."""
    if flow.of(args_of(node)[0]) != WHOLE:
        raise mixed(node, "looks up in a split table")
    if any(args_of(node)[3:]):
        raise mixed(node, "has a gradient that counts all indices or is sparse")
    return flow.of(args_of(node)[1])


@back(aten.embedding.default)
def look_up_back(node: Node, split: Split) -> dict[Node, Split]:
    """The rows that the indices pick."""
    return {args_of(node)[1]: split}


@rule(aten.index_select.default)
def select_rows(node: Node, flow: Flow) -> Placement:
    """A whole index along another dim."""
    split = flow.of(args_of(node)[0])
    if flow.of(args_of(node)[2]) != WHOLE:
        raise mixed(node, "has a split index")
    if isinstance(split, Split) and split.dim == args_of(node)[1] % len(shape_of(args_of(node)[0])):
        raise mixed(node, "selects along the split dim")
    return split
