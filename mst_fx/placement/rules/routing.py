"""Rows that are sorted by a key, computed on by group, and unsorted again: the routed tokens of a mixture of experts.

Each chunk sorts its own rows where the graph sorts along the split axis. The loop computes the same if the rows are
unsorted again: the sorted rows of a chunk are no slice of the graph's sorted rows, and only an op that undoes the
permutation makes a split value of them. Each chunk also counts its own keys: the counts tell where its groups begin.

    kind           value                          kind       value
    "permutation"  sort(key)[1]                   "rows"     x[permutation], grouped products of it, elementwise ops
    "groups"       cumsum(histc(key))             "inverse"  of a permutation: rows[inverse] is split again, as is a
                                                             sum that adds rows to the places that it names
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.fx import Node

from mst_fx.core.aten_ops import (
    CASTS,
    COPIES,
    COUNTS,
    GROUPED_PRODUCTS,
    KEEP_PERMUTATION,
    RESHAPES,
    ROW_ADDS,
    ROW_PICKS,
    SORTS,
)
from mst_fx.core.sizes import sure
from mst_fx.core.torch_private.collectives import EXCHANGES
from mst_fx.ops.overwritten import overwritten
from mst_fx.placement.placement import WHOLE, Placement, Routed, Split, same_shape
from mst_fx.placement.rules.counting import RowWrite, counted_key, feeds_groups, row_write, takes_range_from_values
from mst_fx.placement.rules.indexing import counts_up
from mst_fx.placement.rules.registry import (
    Demand,
    Flow,
    NodePlacement,
    args_of,
    argument,
    mixed,
    rule,
    rule_for,
    shape_of,
)

aten = torch.ops.aten

Handler = Callable[[Node, Flow], NodePlacement]


def route(node: Node, flow: Flow) -> NodePlacement | None:
    """Return the placement of an op that sorts along the axis or reads a routed value; None for any other op.

    Raises:
        Refusal: the permutation would be lost, or the op needs the rows of other chunks.
        Demand: a whole operand has to be split.
    """
    routed = any(isinstance(flow.of(operand), Routed) for operand in node.all_input_nodes if _is_tensor(operand))
    starts = node.target in (*SORTS, *COUNTS) and isinstance(flow.of(args_of(node)[0]), Split)
    if not routed and not (starts and len(shape_of(args_of(node)[0])) == 1):
        return None
    return _HANDLERS.get(node.target, _keep_apart)(node, flow)


def count(node: Node, flow: Flow) -> Routed | None:
    """Return the placement of counts of split keys that say where groups end; None for any other value.

    Raises:
        Demand: the ones that are added up have to be split, too.
    """
    key = counted_key(node)
    split = flow.of(key)
    if key is None or not isinstance(split, Split) or not feeds_groups(node):
        return None
    ones = _row_write(node).values if node.target in ROW_ADDS else None
    if isinstance(ones, Node) and shape_of(ones) and flow.of(ones) == WHOLE:
        raise Demand(ones, split)
    return Routed("counts", key_of(key), split)


@rule(*GROUPED_PRODUCTS, *COUNTS)
def unsorted(node: Node, flow: Flow) -> Placement:
    """Where the rows are not sorted by chunk, all operands must be whole."""
    if any(flow.of(operand) != WHOLE for operand in node.all_input_nodes):
        raise mixed(node, "works on rows that were not sorted by mini-sequence")
    return WHOLE


def key_of(node: Node) -> Node:
    """Return the node that is sorted or counted, before reshapes and casts: these keep the order of the values."""
    while node.target in (*RESHAPES, *CASTS) or _is_full_slice(node):
        node = node.all_input_nodes[0]
    return node


def _is_full_slice(node: Node) -> bool:
    return node.target == aten.slice.Tensor and same_shape(shape_of(node), shape_of(args_of(node)[0]))


def inverted(node: Node, placement: object) -> Node | None:
    """Return the permutation that a node inverts by writing positions along it; None for any other node."""
    inverts = isinstance(placement, Routed) and placement.kind == "inverse"
    return _row_write(node).index if inverts and node.target in (aten.index_put.default, aten.scatter.src) else None


def _sort(node: Node, flow: Flow) -> NodePlacement:
    """Place (values, permutation); a sort of a permutation gives its inverse."""
    data, placement = args_of(node)[0], flow.of(args_of(node)[0])
    if argument(node, "descending"):
        raise mixed(node, "sorts the split dim, the largest first")
    if isinstance(placement, Split):
        rows = Routed("rows", key_of(data), placement, by=node)
        return (rows, replace(rows, kind="permutation"))
    is_permutation = isinstance(placement, Routed) and placement.kind == "permutation" and placement.per == 1
    if isinstance(placement, Routed) and is_permutation and len(shape_of(data)) == 1:
        return (replace(placement, kind="opaque"), replace(placement, kind="inverse"))
    raise mixed(node, "sorts sorted rows once more")


def _count(node: Node, flow: Flow) -> NodePlacement:
    """Place the number of keys in each group; keys below the first group would shift the groups without a loop, too.

    An op without a range takes that of the values, which differs from chunk to chunk.
    """
    data, placement = args_of(node)[0], flow.of(args_of(node)[0])
    if takes_range_from_values(node):
        raise mixed(node, "takes its range from all values")
    if isinstance(placement, Split):
        return Routed("counts", key_of(data), placement)
    if isinstance(placement, Routed) and placement.kind == "rows":
        return replace(placement, kind="counts", by=None)
    raise mixed(node, "counts something else than keys")


def _cumulate(node: Node, flow: Flow) -> NodePlacement:
    """Place a cumulative sum: of counts, it is the ends of the groups."""
    placement = flow.of(args_of(node)[0])
    if isinstance(placement, Routed) and placement.kind == "counts":
        return replace(placement, kind="groups")
    return _keep_apart(node, flow)


def _divide(node: Node, flow: Flow) -> NodePlacement:
    """Place a quotient: a permutation of rows, divided by `per`, names the wider rows that hold `per` of them."""
    placement, divisor = flow.of(args_of(node)[0]), args_of(node)[1]
    if not isinstance(placement, Routed) or placement.kind != "permutation":
        return _keep_apart(node, flow)
    floors = node.target == aten.floor_divide.default or argument(node, "rounding_mode") == "floor"
    if not floors or not isinstance(divisor, int) or not sure(placement.split.inner % (placement.per * divisor) == 0):
        raise mixed(node, "computes with positions of the split dim")
    return replace(placement, per=placement.per * divisor)


def _multiply(node: Node, flow: Flow) -> NodePlacement:
    """Place the product of sorted rows and one matrix for each group."""
    rows, weight, groups = (flow.of(arg) for arg in args_of(node)[:3])
    if not isinstance(rows, Routed) or not isinstance(groups, Routed) or rows.key is not groups.key:
        raise mixed(node, "has groups that are not those of its rows")
    if (rows.kind, rows.split.dim, groups.kind, weight) != ("rows", 0, "groups", WHOLE) or any(args_of(node)[3:]):
        raise mixed(node, "multiplies more than rows by one matrix a group")
    return rows


def _pick(node: Node, flow: Flow) -> NodePlacement:
    """Place rows picked from dim 0: they are sorted, unsorted, or looked up in a whole table."""
    data, index = _row_pick(node)
    table, picked = flow.of(data), flow.of(index)
    if isinstance(picked, Routed) and picked.kind == "permutation":
        expected = _narrowed(picked)
        if table == WHOLE:
            raise Demand(data, expected)
        if table == expected:
            return replace(picked, kind="rows", per=1)
    if isinstance(table, Routed) and table.kind == "rows" and picked == replace(table, kind="inverse"):
        return table.split
    if isinstance(picked, Routed) and picked.kind == "rows" and table == WHOLE and node.target == aten.index.Tensor:
        return picked
    raise mixed(node, "picks rows of the split dim in an order of its own")


def _add(node: Node, flow: Flow) -> NodePlacement:
    """Place a write: it brings sorted rows back to where they came from, or inverts a permutation by writing positions.

    A permutation names each row once, so that nothing is left of a value that rows are written to.
    """
    written = _row_write(node)
    permutation, rows = flow.of(written.index), flow.of(written.values)
    if not isinstance(permutation, Routed) or permutation.kind != "permutation":
        raise mixed(node, "writes to rows in an order of its own")
    if not written.accumulates and permutation.per != 1:
        raise mixed(node, "writes to rows in an order of its own")
    if not written.accumulates and _are_positions(written):
        return replace(permutation, kind="inverse")
    if not isinstance(rows, Routed) or (rows.kind, rows.by, rows.split.dim) != ("rows", permutation.by, 0):
        raise mixed(node, "writes rows that are in another order")
    expected = _narrowed(permutation)
    if flow.of(written.target) == WHOLE:
        raise Demand(written.target, expected)
    if flow.of(written.target) != expected:
        raise mixed(node, "writes to rows that are split differently")
    return expected


def _keep_apart(node: Node, flow: Flow) -> NodePlacement:
    """Place an op that keeps rows apart: it does so for sorted rows if all operands are sorted by one permutation."""
    routed = _common_placement(node, flow)
    if routed.kind == "rows" or (node.target in KEEP_PERMUTATION and routed.kind in ("permutation", "inverse")):
        return _as_split_rows(node, flow, routed)
    if routed.kind in ("counts", "groups") and node.target in CASTS:
        return routed
    if node.target in KEEP_PERMUTATION:
        raise mixed(node, "reads rows in an order that it does not know")
    if node.target in (*COPIES, overwritten):
        return replace(routed, kind="opaque")  # memory of the same shape
    raise mixed(node, "computes with positions of the split dim")


def _common_placement(node: Node, flow: Flow) -> Routed:
    """Return the placement that all operands of a node have, except those that are whole.

    Raises:
        Refusal: they are of several kinds, or sorted by several permutations.
    """
    found = [p for p in (flow.of(arg) for arg in node.all_input_nodes if _is_tensor(arg)) if p != WHOLE]
    routed = {(p.kind, p.key, p.by): p for p in found if isinstance(p, Routed)}
    if len(routed) != 1 or not all(isinstance(p, Routed) for p in found):
        raise mixed(node, "combines rows in different orders")
    return next(iter(routed.values()))


def _as_split_rows(node: Node, flow: Flow, routed: Routed) -> NodePlacement:
    """Place the result of an op on sorted rows by its rule for split rows."""
    known = rule_for(node.target)
    if known is None:
        raise mixed(node, "reads rows in an order that it does not know")
    try:
        result = known(node, _AsSplit(flow))
    except Demand:
        raise mixed(node, "combines sorted rows with rows that are not") from None
    placements = result if isinstance(result, tuple) else (result,)
    placed = tuple(_routed_again(node, routed, one) for one in placements)
    return placed if isinstance(result, tuple) else placed[0]


class _AsSplit:
    """Shows routed operands as split ones, to the rules of ops that keep rows apart."""

    def __init__(self, flow: Flow) -> None:
        self._flow = flow

    def of(self, arg: Any) -> Placement:
        placement = self._flow.of(arg)
        return placement.split if isinstance(placement, Routed) else placement


def _routed_again(node: Node, routed: Routed, result: Placement) -> Placement:
    if not isinstance(result, Split):
        return result
    if (result.outer, result.inner) != (routed.split.outer, routed.split.inner):
        raise mixed(node, "takes sorted rows for rows in their own order")
    return replace(routed, split=result)


def _narrowed(permutation: Routed) -> Split:
    """Return the split of the rows that a permutation names."""
    return Split(0, permutation.split.outer, permutation.split.inner // permutation.per)


def _row_pick(node: Node) -> tuple[Node, Node]:
    """Return the operand and the index of a pick along dim 0.

    Raises:
        Refusal: the op picks along another dim.
    """
    if node.target == aten.gather.default:
        data, dim, index = args_of(node)[:3]
        same = dim == 0 and same_shape(shape_of(data)[1:], shape_of(index)[1:])
    elif node.target == aten.index_select.default:
        data, dim, index = args_of(node)[:3]
        same = dim == 0
    else:
        data, indices = args_of(node)[:2]
        index, same = indices[0], len(indices) == 1 and len(shape_of(indices[0])) == 1
    if not same or not isinstance(index, Node):
        raise mixed(node, "picks along another dim than that of the rows")
    return data, index


def _row_write(node: Node) -> RowWrite:
    """Return what an op writes to rows.

    Raises:
        Refusal: the op writes along another dim.
    """
    found = row_write(node)
    if found is None:
        raise mixed(node, "writes along another dim than that of the rows")
    return found


def _are_positions(written: RowWrite) -> bool:
    """Return whether each row that the index names is given its position in the index."""
    values = written.values
    return isinstance(values, Node) and counts_up(values) and same_shape(shape_of(values), shape_of(written.index))


def _is_tensor(node: Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def _exchange(node: Node, _: Flow) -> NodePlacement:
    raise mixed(node, "gives sorted rows to other ranks")


_HANDLERS: dict[Any, Handler] = {
    **dict.fromkeys(EXCHANGES, _exchange),
    **dict.fromkeys(SORTS, _sort),
    **dict.fromkeys(GROUPED_PRODUCTS, _multiply),
    **dict.fromkeys(ROW_PICKS, _pick),
    **dict.fromkeys((*ROW_ADDS, aten.scatter.src), _add),
    **dict.fromkeys((aten.floor_divide.default, aten.div.Tensor_mode), _divide),
    **dict.fromkeys(COUNTS, _count),
    aten.cumsum.default: _cumulate,
}
