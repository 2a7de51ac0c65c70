"""Attention with its projections, over groups of heads: queries, keys and values of all heads never exist at once.

Legend: T tokens, H heads.
"""

from __future__ import annotations

from torch.fx import Node

from mst_fx.recognise.pattern import Pattern, Reader, Region, heads_region, register


@register
class Attention(Pattern):
    """Projections of queries, keys and values, what is made of them (rotary, norms), attention, and its views."""

    name = "attention"
    priority = 40

    def match(self, reader: Reader, node: Node) -> Region | None:
        """Start at the attention op."""
        return heads_region(reader, node)
