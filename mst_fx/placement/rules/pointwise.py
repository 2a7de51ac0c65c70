"""Elementwise ops, with broadcasting: the operands' dims are aligned from the right."""

from __future__ import annotations

import torch
from torch.fx import Node

from mst_fx.core.aten_ops import COPIES, UNTAGGED_POINTWISE
from mst_fx.core.refusal import Reason, Refusal
from mst_fx.core.sizes import sure
from mst_fx.ops.overwritten import overwritten
from mst_fx.placement.placement import WHOLE, Placement, Split
from mst_fx.placement.rules.registry import Demand, Flow, back, mixed, rule, shape_of


@rule("pointwise", *COPIES, overwritten, *UNTAGGED_POINTWISE)
def pointwise(node: Node, flow: Flow) -> Placement:
    """Every operand that has the split dim must be split along it; a size of 1 broadcasts."""
    if not isinstance(node.meta["val"], torch.Tensor):
        raise Refusal(Reason.UNKNOWN_OP, node, f"{node.target} has several results and no rule of its own")
    rank = len(shape_of(node))
    split = aligned_split(node, flow, rank)
    if split is None:
        return WHOLE
    demand_aligned(node, flow, split, rank)
    return split


@back("pointwise", *COPIES, overwritten, *UNTAGGED_POINTWISE)
def aligned(node: Node, split: Split) -> dict[Node, Split]:
    """The operands that have the split dim at full size."""
    shape = shape_of(node)
    demands = {}
    for operand in node.all_input_nodes:
        dim = split.dim - len(shape) + len(shape_of(operand))
        if dim >= 0 and sure(shape_of(operand)[dim] == shape[split.dim]):
            demands[operand] = split.moved(dim)
    if not demands:
        raise mixed(node, "is needed split, but its operands are whole")
    return demands


def aligned_split(node: Node, flow: Flow, rank: int) -> Split | None:
    """Return the split of the operands, in the result's dims; None if no operand is split.

    Raises:
        Refusal: two operands are split differently.
    """
    found: Split | None = None
    for operand in node.all_input_nodes:
        placement = flow.of(operand)
        if isinstance(placement, Split):
            split = placement.moved(placement.dim + rank - len(shape_of(operand)))
            if found not in (None, split):
                raise mixed(node, f"combines values split as {found} and {split}")
            found = split
    return found


def demand_aligned(node: Node, flow: Flow, split: Split, rank: int) -> None:
    """Raise a `Demand` for an operand that is whole but has the split dim."""
    for operand in node.all_input_nodes:
        shape = shape_of(operand)
        dim = split.dim - rank + len(shape)
        if not isinstance(flow.of(operand), Split) and dim >= 0 and not sure(shape[dim] == 1):
            raise Demand(operand, split.moved(dim))
