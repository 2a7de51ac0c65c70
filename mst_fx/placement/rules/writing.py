"""Writes at indices along another dim than the split one: the operand and the values written to it are split alike."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from mst_fx.core.aten_ops import PUTS, ROW_WRITES, SCATTERS, SLICE_WRITES
from mst_fx.core.sizes import sure
from mst_fx.placement.placement import WHOLE, Placement, Split
from mst_fx.placement.rules.indexing import Picks, picks_of, positions_of
from mst_fx.placement.rules.registry import Demand, Flow, args_of, argument, back, mixed, rule, shape_of

aten = torch.ops.aten


@rule(*SCATTERS)
def scatter(node: Node, flow: Flow) -> Placement:
    """The operand, the index and the values written have the same rows."""
    operands = node.all_input_nodes
    split = next((placement for placement in map(flow.of, operands) if isinstance(placement, Split)), None)
    if split is None:
        return WHOLE
    _forbid_along(node, split)
    if not all(sure(shape_of(operand)[split.dim] == shape_of(node)[split.dim]) for operand in operands):
        raise mixed(node, "has fewer indices than rows")
    return _alike(node, flow, split, dict.fromkeys(operands, split))


@rule(*ROW_WRITES)
def write_rows(node: Node, flow: Flow) -> Placement:
    """The index is whole; the operand and the values written are split alike, along another dim."""
    index: Any = argument(node, "index")
    operands = [operand for operand in node.all_input_nodes if operand is not index]
    split = next((placement for placement in map(flow.of, operands) if isinstance(placement, Split)), None)
    if flow.of(index) != WHOLE:
        raise mixed(node, "writes to rows that a split index names")
    if split is None:
        return WHOLE
    _forbid_along(node, split)
    return _alike(node, flow, split, dict.fromkeys(operands, split))


@rule(*PUTS)
def put(node: Node, flow: Flow) -> Placement:
    """The indices are whole and name no position of the split dim, or count all of them; the values broadcast."""
    value, values = args_of(node)[0], argument(node, "values")
    if all(flow.of(operand) == WHOLE for operand in node.all_input_nodes):
        return WHOLE
    picks = picks_of(node)
    counted = [dim for dim, index in picks.indices.items() if index in positions_of(node)]
    if len(counted) == 1:
        return _paired_put(node, flow, picks, counted[0])
    if any(flow.of(index) != WHOLE for index in picks.indices.values()):
        raise mixed(node, "writes where split indices say")
    split, brought = flow.of(value), flow.of(values)
    added = len(picks.picked) + len(picks.unindexed) - len(shape_of(values))
    if split == WHOLE and isinstance(brought, Split):
        dim = picks.dim_in_value(brought.dim + added)
        if dim is None:
            raise mixed(node, "writes split values to rows")
        raise Demand(value, brought.moved(dim))
    assert isinstance(split, Split)
    place = picks.dim_in_result(split.dim)
    if place is None:
        raise mixed(node, "writes along the split dim")
    own = place - added
    written = {values: split.moved(own)} if own >= 0 and not sure(shape_of(values)[own] == 1) else {}
    if not written and brought != WHOLE:
        raise mixed(node, "joins values that are split differently")
    return _alike(node, flow, split, {value: split, **written})


def _paired_put(node: Node, flow: Flow, picks: Picks, counted: int) -> Placement:
    """Return the placement where one index counts all positions of a dim: the others write to each row at its own."""
    rows = picks.indices[counted]
    made = picks.made_dim(rows, positions_of(node)[rows])
    values, outer = argument(node, "values"), len(picks.picked) + len(picks.unindexed)
    of_dim = {args_of(node)[0]: counted, values: made - outer + len(shape_of(values))}
    of_dim |= {given: picks.making_dim(given, made) for given in picks.indices.values() if given is not rows}
    split = next((flow.of(operand) for operand in of_dim if isinstance(flow.of(operand), Split)), None)
    if not isinstance(split, Split) or flow.of(rows) != WHOLE or list(picks.indices.values()).count(rows) > 1:
        raise mixed(node, "counts rows that are split")
    broadcast = of_dim[values] < 0 or sure(shape_of(values)[of_dim[values]] == 1)
    expected = {node: split.moved(dim) for node, dim in of_dim.items() if dim is not None and dim >= 0}
    if broadcast:
        expected.pop(values, None)
    if any(flow.of(operand) != WHOLE for operand in of_dim if operand not in expected):
        raise mixed(node, "joins values that are split differently")
    return _alike(node, flow, split.moved(counted), expected)


@rule(*SLICE_WRITES)
def write_slice(node: Node, flow: Flow) -> Placement:
    """A slice, or one position, of another dim is replaced; the operand and the values written are split alike."""
    value, written, dim = args_of(node)[:3]
    dim = dim % len(shape_of(value))
    lost = node.target == aten.select_scatter.default
    split, inner = flow.of(value), flow.of(written)
    if not isinstance(split, Split):
        if not isinstance(inner, Split):
            return WHOLE
        split = inner.moved(inner.dim + (lost and inner.dim >= dim))
    _forbid_along(node, split)
    own = split.moved(split.dim - (lost and split.dim > dim))
    return _alike(node, flow, split, {value: split, written: own})


@back(*SCATTERS)
def scatter_back(node: Node, split: Split) -> dict[Node, Split]:
    """The operand, the index and the values written lie as the result."""
    _forbid_along(node, split)
    return dict.fromkeys(node.all_input_nodes, split)


@back(*ROW_WRITES, *PUTS, *SLICE_WRITES)
def value_back(node: Node, split: Split) -> dict[Node, Split]:
    """The operand lies as the result; the rule demands the values written."""
    return {args_of(node)[0]: split}


def _forbid_along(node: Node, split: Split) -> None:
    if split.dim == argument(node, "dim") % max(len(shape_of(node)), 1):
        raise mixed(node, "writes along the split dim")


def _alike(node: Node, flow: Flow, result: Split, expected: dict[Node, Split]) -> Split:
    """Return the result's split if each operand is split as expected; demand that of operands that are whole."""
    for operand, split in expected.items():
        if flow.of(operand) == WHOLE:
            raise Demand(operand, split)
        if flow.of(operand) != split:
            raise mixed(node, "joins values that are split differently")
    return result
