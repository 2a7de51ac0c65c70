"""Gathers and look-ups along another dim than the split one."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from mst_fx.placement import WHOLE, Placement, Split
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
        raise mixed(node, "gathers along the split dim")
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
