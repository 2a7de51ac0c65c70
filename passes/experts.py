"""Mixture of experts: each token goes to several experts, whose matrices multiply it, and their outputs add up.

Legend: N tokens, K experts for each token, E experts, D model, F feed-forward of an expert. Large values have a row for
each pair of a token and an expert: [N * K, D] and [N * K, F]; or, where every expert sees every token, [E, N, D].
"""

from __future__ import annotations

from torch.fx import Node

from mst_fx.recognise.pattern import (
    Growth,
    Pattern,
    Reader,
    Reason,
    Refusal,
    Region,
    grow,
    op_name,
    register,
    whole_region,
)


@register
class Experts(Pattern):
    """Tokens that are repeated, or picked more than once, up to values with one row for each token again."""

    name = "experts"
    priority = 5

    def match(self, reader: Reader, node: Node) -> Region | None:
        """Start where the tokens are repeated, or multiplied by the experts' matrices if each goes to one expert."""
        up = reader.widening(node) if multiplies_by_experts(reader, node) else None
        stream = up.activation if up is not None else reader.repeats(node)
        growth = grow(reader, node, stream) if stream is not None else None
        if stream is None or growth is None:
            return None
        if not any(multiplies_by_experts(reader, n) for n in growth.nodes):
            text = f"{op_name(node)} repeats values, and no experts' matrices multiply them"
            reader.unmatched.give_up(growth.nodes, Refusal(Reason.NO_PATTERN, node, text), node)
            return None
        return whole_region(reader, growth, stream, smaller=None if up is not None else behind_picks(reader, growth))


def multiplies_by_experts(reader: Reader, node: Node) -> bool:
    """Return whether the node is a product with one matrix for each of several groups."""
    contraction = reader.contraction(node)
    return contraction is not None and contraction.grouped


def behind_picks(reader: Reader, growth: Growth) -> Region | None:
    """Return the region of a growth's experts alone, which reads the rows that were picked; None if it is none.

    Where each expert chooses its tokens, the picks mix tokens, and the slots of an expert are apart all the same.
    """
    first = next(node for node in reader.order if node in growth.nodes and multiplies_by_experts(reader, node))
    up = reader.widening(first)
    inner = grow(reader, first, up.activation) if up is not None else None
    try:
        return whole_region(reader, inner, up.activation) if up is not None and inner is not None else None
    except Refusal:
        return None
