"""Mixture of experts: tokens go to several experts each, an expert's matrices multiply its tokens, the shares add up.

Legend: N tokens, K experts a token, D model, F feed-forward of an expert. The large ones are what has a row for each
pair of a token and an expert: [N * K, D] and [N * K, F]; or, where every expert sees every token, [E, N, D].
"""

from __future__ import annotations

from torch.fx import Node

from mst_fx.recognise.pattern import Pattern, Reader, Region, grow, region_of_mlp, register


@register
class Experts(Pattern):
    """Tokens repeated, or picked more than once, that end in one value a token again."""

    name = "experts"
    priority = 5

    def match(self, reader: Reader, node: Node) -> Region | None:
        """Anchored where the tokens are repeated, or multiplied by the experts' matrices if each goes to one expert."""
        up = reader.widening(node) if multiplies_by_experts(reader, node) else None
        tokens = up.activation if up is not None else reader.repeats(node)
        growth = grow(reader, node, tokens) if tokens is not None else None
        if tokens is None or growth is None or not any(multiplies_by_experts(reader, n) for n in growth.nodes):
            return None
        return region_of_mlp(reader, growth, tokens)


def multiplies_by_experts(reader: Reader, node: Node) -> bool:
    """Whether the node is a product with one matrix for each of several groups."""
    contraction = reader.contraction(node)
    return contraction is not None and reader.rank(contraction.weight) == 3
