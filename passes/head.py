"""A head: a widening projection, and the losses, log-probabilities and metrics that are made of its logits.

Legend: N tokens, D model, V vocabulary (classes); the [N, V] values are large.
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
    best_region,
    grow,
    register,
)

aten = torch.ops.aten

NEGATIVE_LOG_LIKELIHOODS = (aten.nll_loss_forward.default, aten.nll_loss2d_forward.default)
NORMALISATIONS = (*NEGATIVE_LOG_LIKELIHOODS, aten._log_softmax.default, aten._softmax.default, aten.logsumexp.default)
"""Ops of logits, and of hardly any other values: where one of them cannot be looped, the report tells why."""

HEAD_RATIO = 4
"""A returned contraction that is this many times wider than the stream counts as logits without a loss."""


@register
class Head(Pattern):
    """A widening contraction whose large values all end in smaller ones."""

    name = "head"
    priority = 30

    def match(self, reader: Reader, node: Node) -> Region | None:
        """Start at the projection; refuse, with advice, a loss whose logits come from elsewhere."""
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
        if not outputs_of(growth):
            leaves = any(user.op == "output" for value in growth.returned for user in value.users)
            if leaves and reader.numel(node) >= HEAD_RATIO * reader.numel(reader.unprojected(head.activation)):
                raise Refusal(Reason.NO_LOSS, node, "the logits leave the graph, and no loss stands behind them")
            return None
        if sum(map(reader.numel, outputs_of(growth))) >= reader.numel(node):
            return None  # a fused projection, split into its outputs
        return best_region(reader, growth, head.activation)


def forbid_foreign_logits(reader: Reader, loss: Node) -> None:
    """Raise a refusal for a loss that no projection of the graph leads to; it names an unknown op, if one does.

    Raises:
        Refusal: NO_HEAD, or that of the unknown op.
    """
    before = ancestors([loss])
    if any(reader.contraction(node) is not None for node in before):
        return
    calls = (node for node in before if node.op.startswith("call_") and reader.tensor_operands(node))
    unknown = next((obstacle for obstacle in map(reader.obstacle, calls) if obstacle is not None), None)
    text = "the logits of this loss come from outside the graph"
    raise Refusal(Reason.NO_HEAD, loss, text) if unknown is None else unknown


def outputs_of(growth: Growth) -> list[Node]:
    """Return the values that the rest of the graph reads, without the large values that are returned."""
    outputs = (node for node in growth.nodes if not growth.nodes.issuperset(node.users))
    return [node for node in outputs if node not in growth.returned]
