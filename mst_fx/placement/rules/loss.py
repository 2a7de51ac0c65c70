"""Losses that aten computes in one op: over rows [N, C], over one row [C], over images [N, C, H, W]."""

from __future__ import annotations

from torch.fx import Node

from mst_fx.core.aten_ops import LOSSES, MEAN, NONE
from mst_fx.placement.placement import PARTIAL, WHOLE, Split
from mst_fx.placement.rules.registry import Demand, Flow, NodePlacement, args_of, mixed, rule, shape_of


@rule(*LOSSES)
def nll_loss(node: Node, flow: Flow) -> NodePlacement:
    """(loss, total weight): losses of rows, or their sum; a mean is decomposed into sum / weight before."""
    scores, target, weight, reduction = args_of(node)[:4]
    split = flow.of(scores)
    if not isinstance(split, Split):
        if flow.of(weight) != WHOLE:
            raise mixed(node, "has split class weights")
        if isinstance(rows := flow.of(target), Split):
            raise Demand(scores, rows.moved(rows.dim + (rows.dim >= 1)))
        return (WHOLE, WHOLE)
    classes = 1 if len(shape_of(scores)) > 1 else 0
    if split.dim == classes or reduction == MEAN:
        raise mixed(node, "reduces over the split dim")
    if flow.of(weight) != WHOLE:
        raise mixed(node, "has split class weights")
    expected = split.moved(split.dim - (split.dim > classes))
    if flow.of(target) == WHOLE:
        assert isinstance(target, Node)
        raise Demand(target, expected)
    if flow.of(target) != expected:
        raise mixed(node, "has targets that are split differently")
    return (expected if reduction == NONE else PARTIAL, PARTIAL)
