"""Gated MLP: down(act(gate(x)) * up(x)), with two up-projections or one that is split in two.

SwiGLU, GeGLU and kin. Legend: N tokens, D model, F feed-forward; the [N, F] values are the large ones.
"""

from __future__ import annotations

from torch.fx import Node

from mst_fx.pattern import Pattern, Reader, Region, Trunk, region_of, register, trunk_of


@register
class GatedMlp(Pattern):
    """Several wide contractions of the stream, or one whose result is cut, joined and contracted back."""

    name = "gated_mlp"
    priority = 10

    def match(self, reader: Reader, node: Node) -> Region | None:
        """Anchored at the down-projection."""
        down = reader.contraction(node)
        if down is None or reader.numel(down.activation) <= reader.numel(node):
            return None
        trunk = trunk_of(reader, down.activation)
        if trunk is None or not is_gated(reader, trunk, down.activation):
            return None
        return region_of(reader, trunk, node)


def is_gated(reader: Reader, trunk: Trunk, joined_NF: Node) -> bool:  # noqa: N803 - axes in the name
    """Two ups, or one that is wider than what the down-projection reads."""
    return len(trunk.ups) > 1 or reader.numel(trunk.ups[0]) > reader.numel(joined_NF)
