"""Ops that make a value from a shape: whole, unless a user needs the rows of one mini-sequence only."""

from __future__ import annotations

from torch.fx import Node

from mst_fx.core.aten_ops import DRAWS, FILLS, RANGES, SCALARS
from mst_fx.placement.placement import WHOLE, Placement, Split
from mst_fx.placement.rules.registry import Flow, back, rule


@rule(*FILLS, *RANGES, *DRAWS, *SCALARS)
def create(node: Node, flow: Flow) -> Placement:
    """No operand's rows end up in the result."""
    return WHOLE


@back(*FILLS, *RANGES)
def part(node: Node, split: Split) -> dict[Node, Split]:
    """A fill makes any part of itself alone; a range is made whole before the loop, and split."""
    return {}
