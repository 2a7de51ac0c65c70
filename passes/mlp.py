"""Plain MLP: down(act(up(x))), one up-projection and elementwise ops; linear, addmm and matmul forms.

Legend: N tokens, D model, F feed-forward; the [N, F] values are the large ones.
"""

from __future__ import annotations

from torch.fx import Node

from mst_fx.pattern import Pattern, Reader, Region, region_of, register, trunk_of


@register
class Mlp(Pattern):
    """One contraction that widens the stream, and one that narrows it back."""

    name = "mlp"
    priority = 20

    def match(self, reader: Reader, node: Node) -> Region | None:
        """Anchored at the down-projection; what the gated pattern takes never comes here."""
        down = reader.contraction(node)
        if down is None or reader.numel(down.activation) <= reader.numel(node):
            return None
        trunk = trunk_of(reader, down.activation)
        if trunk is None or len(trunk.ups) != 1:
            return None
        return region_of(reader, trunk, node)
