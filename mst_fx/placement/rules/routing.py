"""Rows sorted by a key, worked on group by group, and brought back: the routed tokens of a mixture of experts.

A sort along the split axis is done by each mini-sequence for its own rows. That is the same computation as long as the
rows come back: what is sorted here is not the part of a value but a value of its own, and only an op that undoes the
order makes it a part again. Counts of the keys are each mini-sequence's own, too, and say where its groups begin.

    order      sort(key)[1]                      rows     x[order], grouped products of it, elementwise ops
    groups     cumsum(histc(key))                inverse  of an order: rows[inverse] is split again, as is a sum
                                                          that adds rows to the places that the order names
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
    KEEP_AN_ORDER,
    RESHAPES,
    ROW_ADDS,
    ROW_PICKS,
    SORTS,
)
from mst_fx.core.sizes import sure
from mst_fx.ops.overwritten import overwritten
from mst_fx.placement.placement import WHOLE, Placement, Routed, Split, same_shape
from mst_fx.placement.rules.counting import counted_key, feeds_groups
from mst_fx.placement.rules.registry import Demand, Flow, Result, args_of, argument, mixed, rule, rule_for, shape_of

aten = torch.ops.aten

Handler = Callable[[Node, Flow], Result]


def route(node: Node, flow: Flow) -> Result | None:
    """The placement of an op that sorts along the axis or reads what is sorted; None for any other op.

    Raises:
        Refusal: the order would be lost, or the op needs the rows of other mini-sequences.
        Demand: as rules do.
    """
    routed = any(isinstance(flow.of(operand), Routed) for operand in node.all_input_nodes if _is_tensor(operand))
    key = None if routed else counted_key(node)
    split = flow.of(key)
    if key is not None and isinstance(split, Split) and feeds_groups(node):
        return Routed("counts", key_of(key), split)
    starts = node.target in (*SORTS, *COUNTS) and isinstance(flow.of(args_of(node)[0]), Split)
    if not routed and not (starts and len(shape_of(args_of(node)[0])) == 1):
        return None
    return _HANDLERS.get(node.target, _apart)(node, flow)


@rule(*GROUPED_PRODUCTS, *COUNTS)
def ordered(node: Node, flow: Flow) -> Placement:
    """Of rows that are not sorted, nothing may be split."""
    if any(flow.of(operand) != WHOLE for operand in node.all_input_nodes):
        raise mixed(node, "works on rows that were not sorted by mini-sequence")
    return WHOLE


def key_of(node: Node) -> Node:
    """What is sorted or counted, whatever its shape and dtype: these keep the order of the values."""
    while node.target in (*RESHAPES, *CASTS) or _is_full_slice(node):
        node = node.all_input_nodes[0]
    return node


def _is_full_slice(node: Node) -> bool:
    return node.target == aten.slice.Tensor and same_shape(shape_of(node), shape_of(args_of(node)[0]))


def inverted(node: Node, placement: object) -> Node | None:
    """The order that a node inverts by writing positions along it; None for any other node."""
    inverts = isinstance(placement, Routed) and placement.kind == "inverse"
    return _row_add(node)[1] if inverts and node.target in (aten.index_put.default, aten.scatter.src) else None


def _sort(node: Node, flow: Flow) -> Result:
    """(values, order); the order of an order is its inverse."""
    source, placement = args_of(node)[0], flow.of(args_of(node)[0])
    if argument(node, "descending"):
        raise mixed(node, "sorts the split dim, the largest first")
    if isinstance(placement, Split):
        rows = Routed("rows", key_of(source), placement, by=node)
        return (rows, replace(rows, kind="order"))
    ordered = isinstance(placement, Routed) and placement.kind == "order" and placement.per == 1
    if isinstance(placement, Routed) and ordered and len(shape_of(source)) == 1:
        return (replace(placement, kind="opaque"), replace(placement, kind="inverse"))
    raise mixed(node, "sorts sorted rows once more")


def _count(node: Node, flow: Flow) -> Result:
    """How many keys fall to each group; keys below the first would shift the groups in the program itself.

    Without a range it is that of the values, and each mini-sequence has another one.
    """
    source, placement = args_of(node)[0], flow.of(args_of(node)[0])
    if argument(node, "min") == argument(node, "max"):
        raise mixed(node, "takes its range from all values")
    if isinstance(placement, Split):
        return Routed("counts", key_of(source), placement)
    if isinstance(placement, Routed) and placement.kind == "rows":
        return replace(placement, kind="counts", by=None)
    raise mixed(node, "counts something else than keys")


def _cumulate(node: Node, flow: Flow) -> Result:
    """Counts become the ends of the groups."""
    placement = flow.of(args_of(node)[0])
    if isinstance(placement, Routed) and placement.kind == "counts":
        return replace(placement, kind="groups")
    return _apart(node, flow)


def _divide(node: Node, flow: Flow) -> Result:
    """An order of rows is one of the wider rows that hold `per` of them."""
    placement, divisor = flow.of(args_of(node)[0]), args_of(node)[1]
    if not isinstance(placement, Routed) or placement.kind != "order":
        return _apart(node, flow)
    floors = node.target == aten.floor_divide.default or argument(node, "rounding_mode") == "floor"
    if not floors or not isinstance(divisor, int) or not sure(placement.split.inner % (placement.per * divisor) == 0):
        raise mixed(node, "computes with positions of the split dim")
    return replace(placement, per=placement.per * divisor)


def _multiply(node: Node, flow: Flow) -> Result:
    """Rows times one matrix a group."""
    rows, weight, groups = (flow.of(arg) for arg in args_of(node)[:3])
    if not isinstance(rows, Routed) or not isinstance(groups, Routed) or rows.key is not groups.key:
        raise mixed(node, "has groups that are not those of its rows")
    if (rows.kind, rows.split.dim, groups.kind, weight) != ("rows", 0, "groups", WHOLE) or any(args_of(node)[3:]):
        raise mixed(node, "multiplies more than rows by one matrix a group")
    return rows


def _pick(node: Node, flow: Flow) -> Result:
    """Rows picked from dim 0: into an order, out of it, or from a whole table."""
    source, index = _row_pick(node)
    table, picked = flow.of(source), flow.of(index)
    if isinstance(picked, Routed) and picked.kind == "order":
        expected = _narrowed(picked)
        if table == WHOLE:
            raise Demand(source, expected)
        if table == expected:
            return replace(picked, kind="rows", per=1)
    if isinstance(table, Routed) and table.kind == "rows" and picked == replace(table, kind="inverse"):
        return table.split
    if isinstance(picked, Routed) and picked.kind == "rows" and table == WHOLE and node.target == aten.index.Tensor:
        return picked
    raise mixed(node, "picks rows of the split dim in an order of its own")


def _add(node: Node, flow: Flow) -> Result:
    """Sorted rows are added to where they came from; or positions are written along an order, which inverts it."""
    target, index, source = _row_add(node)
    order, rows = flow.of(index), flow.of(source)
    if not isinstance(order, Routed) or order.kind != "order":
        raise mixed(node, "adds to rows in an order of its own")
    if not _accumulates(node):
        if order.per == 1 and isinstance(source, Node) and _counts_up(source, shape_of(index)):
            return replace(order, kind="inverse")
        raise mixed(node, "writes to rows in an order of its own")
    if not isinstance(rows, Routed) or (rows.kind, rows.by, rows.split.dim) != ("rows", order.by, 0):
        raise mixed(node, "adds rows that are in another order")
    expected = _narrowed(order)
    if flow.of(target) == WHOLE:
        raise Demand(target, expected)
    if flow.of(target) != expected:
        raise mixed(node, "adds to rows that are split differently")
    return expected


def _apart(node: Node, flow: Flow) -> Result:
    """An op that keeps rows apart does so in any order, if all that it reads is in that one."""
    routed = _one_order(node, flow)
    if routed.kind == "rows" or (node.target in KEEP_AN_ORDER and routed.kind in ("order", "inverse")):
        return _as_split_rows(node, flow, routed)
    if routed.kind in ("counts", "groups") and node.target in CASTS:
        return routed
    if node.target in KEEP_AN_ORDER:
        raise mixed(node, "reads rows in an order that it does not know")
    if node.target in (*COPIES, overwritten):
        return replace(routed, kind="opaque")  # memory of the same shape
    raise mixed(node, "computes with positions of the split dim")


def _one_order(node: Node, flow: Flow) -> Routed:
    """What all operands of a node are that are not whole.

    Raises:
        Refusal: they are several things, or in several orders.
    """
    found = [p for p in (flow.of(arg) for arg in node.all_input_nodes if _is_tensor(arg)) if p != WHOLE]
    routed = {(p.kind, p.key, p.by): p for p in found if isinstance(p, Routed)}
    if len(routed) != 1 or not all(isinstance(p, Routed) for p in found):
        raise mixed(node, "combines rows in different orders")
    return next(iter(routed.values()))


def _as_split_rows(node: Node, flow: Flow, routed: Routed) -> Result:
    """The rule of an op for rows that are split tells what becomes of rows in an order of their own."""
    known = rule_for(node.target)
    if known is None:
        raise mixed(node, "reads rows in an order that it does not know")
    try:
        result = known(node, _AsSplit(flow))
    except Demand:
        raise mixed(node, "combines sorted rows with rows that are not") from None
    parts = result if isinstance(result, tuple) else (result,)
    placed = tuple(_again(node, routed, part) for part in parts)
    return placed if isinstance(result, tuple) else placed[0]


class _AsSplit:
    """Rows in any order, seen by the rules of ops that keep rows apart."""

    def __init__(self, flow: Flow) -> None:
        self._flow = flow

    def of(self, arg: Any) -> Placement:
        placement = self._flow.of(arg)
        return placement.split if isinstance(placement, Routed) else placement


def _again(node: Node, routed: Routed, result: Placement) -> Placement:
    if not isinstance(result, Split):
        return result
    if (result.outer, result.inner) != (routed.split.outer, routed.split.inner):
        raise mixed(node, "takes sorted rows for rows in their own order")
    return replace(routed, split=result)


def _narrowed(order: Routed) -> Split:
    """The split of the rows that an order names."""
    return Split(0, order.split.outer, order.split.inner // order.per)


def _row_pick(node: Node) -> tuple[Node, Node]:
    """Operand and index of a pick along dim 0."""
    if node.target == aten.gather.default:
        source, dim, index = args_of(node)[:3]
        same = dim == 0 and same_shape(shape_of(source)[1:], shape_of(index)[1:])
    elif node.target == aten.index_select.default:
        source, dim, index = args_of(node)[:3]
        same = dim == 0
    else:
        source, indices = args_of(node)[:2]
        index, same = indices[0], len(indices) == 1 and len(shape_of(indices[0])) == 1
    if not same or not isinstance(index, Node):
        raise mixed(node, "picks along another dim than that of the rows")
    return source, index


def _row_add(node: Node) -> tuple[Node, Node, Any]:
    """Target, index and source of an op that writes to rows."""
    if node.target == aten.index_put.default:
        target, indices, source = args_of(node)[:3]
        index, rows = indices[0], len(indices) == 1 and len(shape_of(indices[0])) == 1
    else:
        target, dim, index, source = args_of(node)[:4]
        rows = dim == 0 and (node.target == aten.index_add.default or same_shape(shape_of(index), shape_of(source)))
    if not rows or not isinstance(index, Node):
        raise mixed(node, "writes along another dim than that of the rows")
    return target, index, source


def _accumulates(node: Node) -> bool:
    return node.target in (aten.scatter_add.default, aten.index_add.default) or args_of(node)[3:4] == (True,)


def _counts_up(node: Node, shape: tuple[int, ...]) -> bool:
    """Whether a value is 0, 1, 2, ... of this shape."""
    return node.target == aten.arange.default and same_shape(shape_of(node), shape)


def _is_tensor(node: Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


_HANDLERS: dict[Any, Handler] = {
    **dict.fromkeys(SORTS, _sort),
    **dict.fromkeys(GROUPED_PRODUCTS, _multiply),
    **dict.fromkeys(ROW_PICKS, _pick),
    **dict.fromkeys((*ROW_ADDS, aten.scatter.src), _add),
    **dict.fromkeys((aten.floor_divide.default, aten.div.Tensor_mode), _divide),
    **dict.fromkeys(COUNTS, _count),
    aten.cumsum.default: _cumulate,
}
