"""Matrix products: a product of split rows has split rows; a contraction over the axis makes a partial sum.

A scale or a bias of a product lies as the rows or columns that it belongs to.
"""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from mst_fx.core.aten_ops import GROUPED_PRODUCTS, PRODUCTS, PRODUCTS_PLUS, SCALED_PRODUCTS
from mst_fx.core.sizes import sure
from mst_fx.placement.placement import PARTIAL, WHOLE, Placement, Split
from mst_fx.placement.rules.registry import Demand, Flow, args_of, back, mixed, rule, shape_of


def factors(node: Node) -> tuple[Any, Any]:
    """Return the two operands that are multiplied: left [.., n, k] and right [.., k, m]."""
    first = node.target in (*GROUPED_PRODUCTS, *SCALED_PRODUCTS)
    left, right = args_of(node)[:2] if first else args_of(node)[-2:]
    return left, right


@rule(*PRODUCTS)
def product(node: Node, flow: Flow) -> Placement:
    """[.., n, k] @ [.., k, m] -> [.., n, m]."""
    return _product(node, flow, args_of(node)[0], args_of(node)[1])


@rule(*PRODUCTS_PLUS)
def product_plus(node: Node, flow: Flow) -> Placement:
    """Bias + product; the bias broadcasts as in a pointwise op."""
    bias, left, right = args_of(node)[:3]
    result = _product(node, flow, left, right)
    if result == PARTIAL:
        raise mixed(node, "adds a bias to a sum over the axis")
    _check_broadcast(node, flow, result, bias, "bias")
    return result


@rule(*SCALED_PRODUCTS)
def scaled_product(node: Node, flow: Flow) -> Placement:
    """[n, k] @ [k, m], times scales: one number, or [n, 1] of the left and [1, m] of the right operand; plus a bias."""
    left, right, left_scale, right_scale, bias, result_scale = args_of(node)[:6]
    result = _product(node, flow, left, right)
    if result == PARTIAL and not (bias is None and result_scale is None):
        raise mixed(node, "adds a bias to a sum over the axis, or scales it to few bits")
    for given, name in ((left_scale, "scale"), (right_scale, "scale"), (bias, "bias"), (result_scale, "scale")):
        if given is not None:
            _check_broadcast(node, flow, result, given, name)
    return result


def _check_broadcast(node: Node, flow: Flow, result: Placement, given: Node, name: str) -> None:
    """Raise a refusal, or a `Demand`, unless an operand that broadcasts to a product lies as the product does."""
    expected: Placement = WHOLE
    if isinstance(result, Split):
        shape = shape_of(given)
        dim = result.dim - len(shape_of(node)) + len(shape)
        expected = result.moved(dim) if dim >= 0 and not sure(shape[dim] == 1) else WHOLE
    if flow.of(given) == WHOLE and isinstance(expected, Split):
        raise Demand(given, expected)
    if flow.of(given) != expected:
        raise mixed(node, f"has a {name} placed as {flow.of(given)} and a product placed as {result}")


@back(*PRODUCTS, *PRODUCTS_PLUS, *SCALED_PRODUCTS)
def product_back(node: Node, split: Split) -> dict[Node, Split]:
    """Rows come from the left operand, columns from the right one, a batch from both; the others may have the dim."""
    left, right = factors(node)
    rank = len(shape_of(node))
    demands = {}
    if split.dim != rank - 1:
        demands[left] = split
    if split.dim != rank - 2:
        demands[right] = split
    for given in (operand for operand in node.all_input_nodes if operand not in (left, right)):
        dim = split.dim - rank + len(shape_of(given))
        if dim >= 0 and not sure(shape_of(given)[dim] == 1):
            demands[given] = split.moved(dim)
    return demands


def _product(node: Node, flow: Flow, left: Any, right: Any) -> Placement:
    rows, inner = len(shape_of(left)) - 2, len(shape_of(left)) - 1
    batch = {0: 0} if rows == 1 else {}
    a, b = flow.of(left), flow.of(right)
    if isinstance(a, Split) and a.dim == inner and b == a.moved(rows):
        return PARTIAL
    if isinstance(a, Split) and a == b and rows == 1 and a.dim == 0:
        return a  # the batch of a bmm
    if a == WHOLE and b == WHOLE:
        return WHOLE
    if isinstance(a, Split) and b == WHOLE:
        return _one_split(node, a, uncontracted=rows, partner=right, shared={inner: rows, **batch})
    if isinstance(b, Split) and a == WHOLE:
        return _one_split(node, b, uncontracted=inner, partner=left, shared={**batch, rows: inner})
    raise mixed(node, f"combines values placed as {a} and {b}")


def _one_split(node: Node, split: Split, uncontracted: int, partner: Any, shared: dict[int, int]) -> Placement:
    """Return the result's split, where one operand is split along a dim that is not contracted.

    Args:
        node: the product.
        split: of the operand that is split.
        uncontracted: the dim of this operand that only the result shares.
        partner: the other operand, which is whole.
        shared: for other dims of the operand, the dim of the partner that must be split with it.

    Raises:
        Demand: the operand is split along a shared dim.
    """
    if split.dim == uncontracted:
        return split
    raise Demand(partner, split.moved(shared[split.dim]))
