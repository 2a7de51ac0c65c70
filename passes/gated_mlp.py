"""Gated MLP: down(act(gate(x)) * up(x)), with two up-projections or one that is split in two.

SwiGLU, GeGLU and kin. Legend: N tokens, D model, F feed-forward; the [N, F] values are the large ones.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from mst_fx.recognise.pattern import Growth, Pattern, Reader, Region, grow, region_of_mlp, register

ADDITIONS = (torch.ops.aten.add.Tensor, torch.ops.aten.sub.Tensor)
"""What joins an adapter's share to a projection."""


@register
class GatedMlp(Pattern):
    """Several wide contractions of the stream, or one whose result is cut, joined and contracted back."""

    name = "gated_mlp"
    priority = 10

    def match(self, reader: Reader, node: Node) -> Region | None:
        """Anchored at the first up-projection."""
        up = reader.widening(node)
        growth = grow(reader, node, up.activation) if up is not None else None
        if up is None or growth is None or not growth.sinks or not is_gated(reader, growth):
            return None
        return region_of_mlp(reader, growth, up.activation)


def is_gated(reader: Reader, growth: Growth) -> bool:
    """Whether what a down-projection reads is smaller than what an up-projection makes, or joins two such values."""
    down = reader.contraction(growth.sinks[0])
    assert down is not None
    if reader.numel(down.activation) < max(map(reader.numel, growth.ups)):
        return True
    behind: dict[Node, set[Node]] = {up: {up} for up in growth.ups}
    for node in sorted(growth.nodes - behind.keys(), key=reader.order.__getitem__):
        parts = [behind.get(operand, set()) for operand in node.all_input_nodes]
        behind[node] = set().union(*parts)
        apart = any(a and b and not (a <= b or b <= a) for a in parts for b in parts)
        if apart and not reader.does(node, ADDITIONS):
            return True
    return False
