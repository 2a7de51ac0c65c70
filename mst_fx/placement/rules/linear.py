"""Ops that may read a partial sum inside the loop: f(a + b) = f(a) + f(b) in the operands that are partial sums."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Node

from mst_fx.core.aten_ops import LINEAR_IN_ALL, LINEAR_IN_FIRST, LINEAR_IN_ONE
from mst_fx.placement.placement import PARTIAL, WHOLE, Placement
from mst_fx.placement.rules.registry import Flow, args_of


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


def _rounds(node: Node) -> bool:
    """Return whether a sum is cast to a dtype that cannot hold it: the rounding errors of the summands add up, too."""
    before, after = (value.meta["val"].dtype for value in (args_of(node)[0], node))
    return after == torch.bool or torch.promote_types(before, after) != after
