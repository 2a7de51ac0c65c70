"""Ops that make a value from a shape: whole, unless a user needs the rows of one mini-sequence only."""

from __future__ import annotations

import torch
from torch.fx import Node

from mst_fx.placement.placement import WHOLE, Placement, Split
from mst_fx.placement.rules.registry import Flow, back, rule

aten = torch.ops.aten

RANGES = (aten.arange.default, aten.arange.start, aten.arange.start_step)
DRAWS = (aten.randint.low,)
"""Random ops without operands: they run once, before the loop."""
FILLS = (
    aten.empty.memory_format,
    aten.full.default,
    aten.zeros.default,
    aten.ones.default,
    aten.new_empty.default,
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_full.default,
)
"""Fills of a `size` with one value, or with none: any part of such a value can be made alone."""


@rule(*FILLS, *RANGES, *DRAWS, aten.scalar_tensor.default)
def create(node: Node, flow: Flow) -> Placement:
    """No operand's rows end up in the result."""
    return WHOLE


@back(*FILLS, *RANGES)
def part(node: Node, split: Split) -> dict[Node, Split]:
    """A fill makes any part of itself alone; a range is made whole before the loop, and split."""
    return {}
