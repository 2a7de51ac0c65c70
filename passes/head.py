"""A head: a wide projection, and the losses, log-probabilities and metrics that are made of its logits.

Legend: N tokens, D model, V vocabulary (classes); the [N, V] values are the large ones.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from mst_fx.recognise.pattern import (
    Growth,
    Pattern,
    Reader,
    Reason,
    Refusal,
    Region,
    ancestors,
    grow,
    region_of_head,
    register,
)

aten = torch.ops.aten

NEGATIVE_LOG_LIKELIHOODS = (aten.nll_loss_forward.default, aten.nll_loss2d_forward.default)
NORMALISATIONS = (*NEGATIVE_LOG_LIKELIHOODS, aten._log_softmax.default, aten._softmax.default, aten.logsumexp.default)
"""What is made of logits and hardly of anything else: where one of these fails, the report tells."""

HEAD_RATIO = 4
"""A returned contraction that is this many times wider than the tokens is taken for logits without a loss."""


@register
class Head(Pattern):
    """A widening contraction all of whose large values end in smaller ones."""

    name = "head"
    priority = 30

    def match(self, reader: Reader, node: Node) -> Region | None:
        """Anchored at the head; a loss whose logits come from elsewhere is refused with advice."""
        head = reader.widening(node)
        if head is None:
            if reader.does(node, NEGATIVE_LOG_LIKELIHOODS):
                forbid_foreign_logits(reader, node)
            return None
        growth = grow(reader, node, head.activation)
        if growth is None or growth.sinks:
            return None
        if growth.obstacle is not None:
            if any(reader.does(inner, NORMALISATIONS) for inner in growth.nodes):
                raise growth.obstacle
            return None
        if not results(growth):
            leaves = any(user.op == "output" for value in growth.returned for user in value.users)
            if leaves and reader.numel(node) >= HEAD_RATIO * reader.numel(reader.unprojected(head.activation)):
                raise Refusal(Reason.NO_LOSS, node, "the logits leave the graph, and no loss stands behind them")
            return None
        if sum(map(reader.numel, results(growth))) >= reader.numel(node):
            return None  # a fused projection, cut into its parts
        return region_of_head(reader, growth, head.activation)


def forbid_foreign_logits(reader: Reader, loss: Node) -> None:
    """Raise a refusal where no projection stands behind a loss: with the op that nobody knows, if there is one."""
    behind = ancestors([loss])
    if any(reader.contraction(node) is not None for node in behind):
        return
    calls = (node for node in behind if node.op.startswith("call_") and reader.tensor_operands(node))
    unknown = next((obstacle for obstacle in map(reader.obstacle, calls) if obstacle is not None), None)
    text = "the logits of this loss come from outside the graph"
    raise Refusal(Reason.NO_HEAD, loss, text) if unknown is None else unknown


def results(growth: Growth) -> list[Node]:
    """What is left of the logits: values that the rest of the graph reads, the returned large ones aside."""
    left = (node for node in growth.nodes if not growth.nodes.issuperset(node.users))
    return [node for node in left if node not in growth.returned]
