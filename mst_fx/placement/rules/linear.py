"""Ops that may read a partial sum inside the loop: f(a + b) = f(a) + f(b) in the operands that are partial sums."""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any

import torch
from torch.fx import Node

from mst_fx.core.aten_ops import (
    CHOICES,
    FILL_VALUES,
    LINEAR_IN_ALL,
    LINEAR_IN_FIRST,
    LINEAR_IN_ONE,
    PRODUCTS,
    SCALARS,
    VIEWS,
    ZEROS,
)
from mst_fx.placement.placement import PARTIAL, WHOLE, Placement
from mst_fx.placement.rules.registry import Flow, args_of

aten = torch.ops.aten


def is_linear(node: Node, flow: Flow) -> bool:
    """Return whether the op's results for each chunk's operands add up to its result for the sums of these operands."""
    placements: list[Placement] = [flow.of(operand) for operand in node.all_input_nodes]
    if any(placement not in (WHOLE, PARTIAL) for placement in placements):
        return False
    first: Any = args_of(node)[0]
    sums = sum(placement == PARTIAL for placement in placements)
    if node.target in LINEAR_IN_FIRST:
        return sums == 1 and flow.of(first) == PARTIAL and not _rounds(node)
    if node.target in LINEAR_IN_ONE:
        return sums == 1 and args_of(node)[0] is not args_of(node)[1]
    operands = [*first] if isinstance(first, (list, tuple)) else args_of(node)[:2]
    return node.target in LINEAR_IN_ALL and all(isinstance(x, Node) and flow.of(x) == PARTIAL for x in operands)


def proportional(nodes: Iterable[Node], starts: Container[Node]) -> set[Node]:
    """Return the nodes whose values are twice as large where those of the starts are.

    Args:
        nodes: in graph order.
        starts: among the nodes.
    """
    found = _Dependent()
    for node in nodes:
        depends = not found.isdisjoint(node.all_input_nodes)
        if node in starts or (depends and (is_linear(node, found) or _scales(node, found))):
            found.add(node)
    return found


class _Dependent(set[Node]):
    """The nodes that depend on some starts; for rules, these are partial sums, and all else is whole."""

    def of(self, arg: Any) -> Placement:
        """Return the placement that stands for an operand."""
        return PARTIAL if isinstance(arg, Node) and arg in self else WHOLE


def _scales(node: Node, dependent: _Dependent) -> bool:
    """Return whether a product, a view, a cast, or a choice between it and zero has one dependent operand."""
    operands = [operand for operand in args_of(node) if isinstance(operand, Node)]
    one = sum(operand in dependent for operand in operands) == 1
    if one and node.target in CHOICES:
        return operands[0] not in dependent and any(map(is_zero, operands[1:]))
    return one and (node.target in (*PRODUCTS, *VIEWS) or casts(node))


def is_zero(node: Node) -> bool:
    """Return whether a node fills a value with zeros: as many of them as there are chunks add up to zero."""
    if node.target in FILL_VALUES:
        return bool(args_of(node)[FILL_VALUES[node.target]] == 0)
    return node.target in ZEROS or (node.target in SCALARS and args_of(node)[0] == 0)


def casts(node: Node) -> bool:
    """Return whether an op casts floating-point numbers to floating-point numbers."""
    values = [operand.meta["val"] for operand in (node, *node.all_input_nodes)]
    return node.target == aten._to_copy.default and all(x.is_floating_point() for x in values)


def _rounds(node: Node) -> bool:
    """Return whether a sum is cast to a dtype that cannot hold it: the rounding errors of the summands add up, too."""
    before, after = (value.meta["val"].dtype for value in (args_of(node)[0], node))
    return after == torch.bool or torch.promote_types(before, after) != after
