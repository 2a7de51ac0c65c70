"""Ops that make a value from a shape: it is whole, unless a reader needs only the rows of one chunk."""

from __future__ import annotations

from torch.fx import Node

from mst_fx.core.aten_ops import DRAWS, FILLS, RANGES, SCALARS
from mst_fx.placement.placement import WHOLE, Placement, Split
from mst_fx.placement.rules.registry import Flow, back, rule


@rule(*FILLS, *RANGES, *DRAWS, *SCALARS)
def create(node: Node, flow: Flow) -> Placement:
    """The result contains no rows of an operand."""
    return WHOLE


@back(*FILLS, *RANGES)
def made_alone(node: Node, split: Split) -> dict[Node, Split]:
    """A fill makes the rows of one chunk alone; a range is made whole before the loop, and then split."""
    return {}
