"""Logits + cross-entropy: loss(tail(head(x)), labels), with any elementwise tail (upcast, scale, soft-cap, views).

Legend: N tokens, D model, V vocabulary; the [N, V] values are the large ones.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from mst_fx.pattern import Contraction, Pattern, Reader, Reason, Refusal, Region, region_of, register, trunk_of

NEGATIVE_LOG_LIKELIHOODS = (torch.ops.aten.nll_loss_forward.default,)

HEAD_RATIO = 4
"""A returned contraction that is this many times wider than its activation is taken for logits without a loss."""


@register
class CrossEntropy(Pattern):
    """A contraction whose result ends in aten's negative log-likelihood."""

    name = "cross_entropy"
    priority = 30

    def match(self, reader: Reader, node: Node) -> Region | None:
        """Anchored at the loss; a head whose logits leave the graph is refused with advice."""
        if ends_in_nll(reader, node):
            trunk = trunk_of(reader, node.all_input_nodes[0], amplifying=False)
            if trunk is None:
                raise Refusal(Reason.NO_HEAD, node, "the logits of this loss come from outside the graph")
            return region_of(reader, trunk, node)
        head = reader.contraction(node)
        if head is not None and is_returned(node) and is_wide(reader, node, head):
            raise Refusal(Reason.NO_LOSS, node, "the logits leave the graph, and no loss stands behind them")
        return None


def ends_in_nll(reader: Reader, node: Node) -> bool:
    """Whether the node opens into a negative log-likelihood over classes."""
    opened = reader.opened(node)
    return opened is not None and any(n.target in NEGATIVE_LOG_LIKELIHOODS for n in opened.graph.nodes)


def is_wide(reader: Reader, node: Node, head: Contraction) -> bool:
    """Whether a contraction widens its activation as a head does."""
    return reader.numel(node) >= HEAD_RATIO * reader.numel(head.activation)


def is_returned(node: Node) -> bool:
    """Whether the value leaves the graph and nothing else reads it."""
    return all(user.op == "output" for user in node.users)
