"""Matrix products: split rows give split rows; a contraction over the axis gives a partial sum."""

from __future__ import annotations

import torch
from torch.fx import Node

from mst_fx.placement import PARTIAL, WHOLE, Placement, Split
from mst_fx.rules.registry import Demand, Flow, mixed, rule, shape_of

aten = torch.ops.aten

CONTRACTIONS = (aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default)


@rule(aten.mm.default, aten.bmm.default)
def product(node: Node, flow: Flow) -> Placement:
    """[.., n, k] @ [.., k, m] -> [.., n, m]."""
    return _product(node, flow, node.args[0], node.args[1])


@rule(aten.addmm.default, aten.baddbmm.default)
def product_plus(node: Node, flow: Flow) -> Placement:
    """Bias + product; the bias broadcasts as in a pointwise op."""
    bias, left, right = node.args[:3]
    result = _product(node, flow, left, right)
    if result == PARTIAL:
        raise mixed(node, "adds a bias to a sum over the axis")
    if isinstance(result, Split):
        shape = shape_of(bias)
        dim = result.dim - len(shape_of(node)) + len(shape)
        if dim >= 0 and shape[dim] != 1 and flow.of(bias) != result.moved(dim):
            raise Demand(_node(bias), result.moved(dim))
    elif flow.of(bias) != WHOLE:
        raise mixed(node, "adds a split bias to a whole product")
    return result


def _product(node: Node, flow: Flow, left: object, right: object) -> Placement:
    rows, inner = len(shape_of(left)) - 2, len(shape_of(left)) - 1
    a, b = flow.of(left), flow.of(right)
    if a == WHOLE and b == WHOLE:
        return WHOLE
    if isinstance(a, Split) and a.dim == rows and b == WHOLE:
        return a
    if isinstance(b, Split) and b.dim == inner and a == WHOLE:
        return b
    if isinstance(a, Split) and a.dim == inner and b == WHOLE:
        raise Demand(_node(right), a.moved(rows))
    if isinstance(b, Split) and b.dim == rows and a == WHOLE:
        raise Demand(_node(left), b.moved(inner))
    if isinstance(a, Split) and isinstance(b, Split) and a.dim == inner and b == a.moved(rows):
        return PARTIAL
    if rows == 1 and (_is_batch(a) or _is_batch(b)):
        if a == b:
            return a
        if b == WHOLE and isinstance(a, Split):
            raise Demand(_node(right), a)
        if a == WHOLE and isinstance(b, Split):
            raise Demand(_node(left), b)
    raise mixed(node, f"combines values placed as {a} and {b}")


def _is_batch(placement: Placement) -> bool:
    return isinstance(placement, Split) and placement.dim == 0


def _node(arg: object) -> Node:
    assert isinstance(arg, Node)
    return arg
