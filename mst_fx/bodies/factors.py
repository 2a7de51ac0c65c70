"""Matrix products at the end of a body move out: the runtime multiplies their factors directly into the results.

Sum ending in A^T B, or a batch of such -> Outer    one sum, no gradient of a chunk
Sum ending in A^T B of groups of rows   -> Grouped  the same for all groups
Cat ending in A1 B1 + A2 B2             -> Rows     written in place, no copy of a chunk
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any, TypeAlias

import torch
from torch.fx import GraphModule, Node

from mst_fx.core.aten_ops import ALIASES, GROUPED_PRODUCTS, PRODUCTS, RESHAPES
from mst_fx.core.sizes import sure
from mst_fx.runtime.result_kinds import Cat, Grouped, Outer, ResultKind, Rows, Sum

aten = torch.ops.aten
Factors: TypeAlias = tuple[Node, ...]
"""The outputs that stand for one product: A and B, and the ends of groups where it is one of groups."""


def take_out_products(module: GraphModule, kinds: Sequence[ResultKind]) -> tuple[ResultKind, ...]:
    """Replace outputs of a body by factors where that is possible; return the new kinds of the results.

    Args:
        module: the body; it is changed in place.
        kinds: the kind of each output, Cat or Sum.
    """
    (output,) = (node for node in module.graph.nodes if node.op == "output")
    values: Any = output.args[0]
    outputs: list[Node] = []
    taken: list[ResultKind] = []
    for value, kind in zip(values, kinds, strict=True):
        factors, new_kind = _outer(value, kind) if isinstance(kind, Sum) else _rows(value, kind)
        outputs += [node for each in factors for node in each] or [value]
        taken.append(new_kind if factors else kind)
    output.args = (tuple(outputs),)
    module.graph.eliminate_dead_code()
    module.graph.lint()
    module.recompile()
    return tuple(taken)


def _outer(value: Node, kind: Sum) -> tuple[list[Factors], ResultKind]:
    """Return the factors A and B with value = A^T B, and their kind; no factors where the value is no such product."""
    transposed = False
    product = value
    while product.target in ALIASES or _is_transpose(product):
        transposed ^= _is_transpose(product)
        (product,) = product.all_input_nodes
    args: Any = product.args
    grouped = _multiplies_columns_by_rows(product)
    if product.target not in PRODUCTS and not grouped:
        return [], kind
    left, right = args[:2]
    factors = (right, _t(left, product)) if transposed else (_t(left, product), right)
    if grouped:
        return [(*factors, args[2])], Grouped(kind.dtype, kind.result)
    return [factors], Outer(kind.dtype, kind.result)


def _multiplies_columns_by_rows(product: Node) -> bool:
    """Return whether a product has a matrix for each group of the terms that are added up, and nothing besides."""
    args: Any = product.args
    if product.target not in GROUPED_PRODUCTS or len(args) < 3 or any(args[3:]) or any(product.kwargs.values()):
        return False
    return isinstance(args[2], Node) and all(factor.meta["val"].dim() == 2 for factor in args[:2])


def _rows(value: Node, kind: ResultKind) -> tuple[list[Factors], ResultKind]:
    """Return the products that add up to the rows of a result whose chunks lie one after the other, and their kind."""
    assert isinstance(kind, Cat)
    sizes = list(value.meta["val"].shape)
    contiguous = kind.outer == 1 and prod(sizes[: kind.dim]) == 1
    products = _summands(value) if contiguous and kind.dim < len(sizes) - 1 else []
    sizes[kind.dim] = 0
    return products, Rows(len(products), (kind.dim, kind.outer, kind.inner), tuple(sizes))


def _summands(value: Node) -> list[Factors]:
    """Return factors of the products that add up to a value, row by row; none where it is anything else."""
    rows = value
    while rows.target in (*RESHAPES, aten.detach.default) and len(rows.users) == 1:
        rows = rows.all_input_nodes[0]
    if len(rows.users) > 1 or not _has_rows_of(rows, value):
        return []  # the body reads it, too, or its rows are not those of the result
    if rows.target == aten.mm.default:
        left, right = rows.args
        assert isinstance(left, Node)
        assert isinstance(right, Node)
        return [(left, right)]
    if rows.target == aten.add.Tensor and not rows.kwargs and len(rows.all_input_nodes) == 2:
        operands = rows.all_input_nodes
        summands = [_summands(operand) if _has_rows_of(operand, rows) else [] for operand in operands]
        return summands[0] + summands[1] if all(summands) else []
    return []


def _has_rows_of(rows: Node, value: Node) -> bool:
    """Return whether two values have as many rows, as many columns, and the same dtype: no row is repeated."""
    a, b = rows.meta["val"], value.meta["val"]
    return a.dtype == b.dtype and a.shape[-1:] == b.shape[-1:] and sure(a.numel() == b.numel())


def _is_transpose(node: Node) -> bool:
    """Return whether a node swaps the last two dims."""
    if node.target == aten.transpose.int:
        dims = node.meta["val"].dim()
        return {int(dim) % dims for dim in node.args[1:3]} == {dims - 2, dims - 1}  # type: ignore[arg-type]
    return node.target == aten.t.default


def _t(node: Node, before: Node) -> Node:
    """Return the transposes of matrices; if a node made these by transposing, its operand."""
    if _is_transpose(node):
        return node.all_input_nodes[0]
    graph = node.graph
    with graph.inserting_before(before):
        transposed = graph.call_function(aten.transpose.int, (node, -2, -1))
    transposed.meta["val"] = node.meta["val"].mT
    return transposed
