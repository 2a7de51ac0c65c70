"""Gated MLP: down(act(gate(x)) * up(x)), with two up-projections or one that is split in two: SwiGLU, GeGLU, ...

Legend: N tokens, D model, F feed-forward; the [N, F] values are large.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from mst_fx.recognise.pattern import Growth, Pattern, Reader, Region, grow, register, whole_region

ADDITIONS = (torch.ops.aten.add.Tensor, torch.ops.aten.sub.Tensor)
"""Ops that add an adapter's output to a projection."""


@register
class GatedMlp(Pattern):
    """Several widening contractions of the stream, or one that is split; their values are joined and narrowed again."""

    name = "gated_mlp"
    priority = 10

    def match(self, reader: Reader, node: Node) -> Region | None:
        """Start at the first up-projection."""
        up = reader.widening(node)
        growth = grow(reader, node, up.activation) if up is not None else None
        if up is None or growth is None or not growth.sinks or not is_gated(reader, growth):
            return None
        return whole_region(reader, growth, up.activation)


def is_gated(reader: Reader, growth: Growth) -> bool:
    """Return whether a down-projection reads less than an up-projection makes, or a value that joins two of these."""
    downs = [down for down in map(reader.contraction, growth.sinks) if down is not None]
    if not downs:
        return False
    if reader.numel(downs[0].activation) < max(map(reader.numel, growth.ups)):
        return True
    ups_of: dict[Node, set[Node]] = {up: {up} for up in growth.ups}
    for node in sorted(growth.nodes - ups_of.keys(), key=reader.order.__getitem__):
        operand_ups = [ups_of.get(operand, set()) for operand in node.all_input_nodes]
        ups_of[node] = set().union(*operand_ups)
        joins = any(a and b and not (a <= b or b <= a) for a in operand_ups for b in operand_ups)
        if joins and not reader.does(node, ADDITIONS):
            return True
    return False
