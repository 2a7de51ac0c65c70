"""Plain MLP: down(act(up(x))), one up-projection and any ops that keep tokens apart; adapters on its matrices.

Legend: N tokens, D model, F feed-forward; the [N, F] values are large.
"""

from __future__ import annotations

from torch.fx import Node

from mst_fx.passes.gated_mlp import is_gated
from mst_fx.recognise.pattern import Pattern, Reader, Region, grow, register, whole_region, within


@register
class Mlp(Pattern):
    """A contraction that widens the stream, and contractions that narrow everything made of it."""

    name = "mlp"
    priority = 20

    def match(self, reader: Reader, node: Node) -> Region | None:
        """Start at the up-projection; or all of the MLP is one function with a backward of its own."""
        inside = reader.inner_contractions(node)
        if len(inside) > 1:
            return whole_region(reader, within(reader, node), inside[0].activation)
        up = reader.widening(node)
        growth = grow(reader, node, up.activation) if up is not None else None
        if up is None or growth is None or not growth.sinks or is_gated(reader, growth):
            return None
        return whole_region(reader, growth, up.activation)
