"""A head: a widening projection, and the losses, log-probabilities and metrics that are made of its logits.

Legend: N tokens, D model, V vocabulary (classes); the [N, V] values are large.
"""

from __future__ import annotations

import torch
from torch.fx import Node

from mst_fx.recognise.pattern import (
    DIVIDED,
    Borders,
    Growth,
    Pattern,
    Reader,
    Reason,
    Refusal,
    Region,
    ancestors,
    best_region,
    comes_from_another,
    grow,
    op_name,
    register,
    within,
)

aten = torch.ops.aten

NEGATIVE_LOG_LIKELIHOODS = (aten.nll_loss_forward.default, aten.nll_loss2d_forward.default)
NORMALISATIONS = (*NEGATIVE_LOG_LIKELIHOODS, aten._log_softmax.default, aten._softmax.default, aten.logsumexp.default)
"""Ops of logits, and of hardly any other values: where one of them cannot be looped, the report tells why."""

ONE_BLOCK = "Let one block hold the head and its loss, or neither: a loop recomputes the logits in any case."
NO_BREAK = "Remove the graph break between the head and its loss: one graph has to hold both."

HEAD_RATIO = 4
"""A returned contraction that is this many times wider than the stream counts as logits without a loss."""


@register
class Head(Pattern):
    """A widening contraction whose large values all end in smaller ones."""

    name = "head"
    priority = 30

    def match(self, reader: Reader, node: Node) -> Region | None:
        """Start at the projection; refuse, with advice, a loss whose logits come from elsewhere."""
        inside = reader.inner_contractions(node)
        if len(inside) == 1:  # the projection and the loss are one function with a backward of its own
            return best_region(reader, within(reader, node), inside[0].activation)
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
            reader.unmatched.give_up(growth.nodes, growth.obstacle, node)
            return None
        if not outputs_of(growth):
            forbid_lone_logits(reader, growth, node, reader.unprojected(head.activation))
            return None
        if sum(map(reader.numel, outputs_of(growth))) >= reader.numel(node):  # a fused projection, split into outputs
            text = f"what is made of {op_name(node)} is as large as its own value"
            reader.unmatched.give_up(growth.nodes, Refusal(Reason.NO_GAIN, node, text), node)
            return None
        return best_region(reader, growth, head.activation)


def forbid_lone_logits(reader: Reader, growth: Growth, head: Node, stream: Node) -> None:
    """Raise a refusal for logits that leave the graph, and no loss stands behind them.

    In a fragment they may be the large values of an MLP as well: the survey tells of these.

    Raises:
        Refusal: NO_LOSS.
    """
    leaves = any(user.op == "output" for value in growth.returned for user in value.users)
    if leaves and not reader.borders.fragment and reader.numel(head) >= HEAD_RATIO * reader.numel(stream):
        raise without_loss(reader.borders, head)


def forbid_foreign_logits(reader: Reader, loss: Node) -> None:
    """Raise a refusal for a loss that no projection of the graph leads to; it names an unknown op, if one does.

    Raises:
        Refusal: NO_HEAD, DDP, or that of the unknown op.
    """
    before = ancestors([loss])
    if any(reader.contraction(node) is not None for node in before):
        return
    ordered = sorted(before, key=reader.order.__getitem__)
    calls = (node for node in ordered if node.op.startswith("call_") and reader.tensor_operands(node))
    unknown = next((obstacle for obstacle in map(reader.obstacle, calls) if obstacle is not None), None)
    if unknown is None and comes_from_another(reader, before):
        raise Refusal(Reason.DDP, loss, f"the logits of this loss come from another fragment: {DIVIDED}")
    raise without_head(reader.borders, loss) if unknown is None else unknown


def without_head(borders: Borders, loss: Node) -> Refusal:
    """Return the refusal of a loss whose logits are made outside of its graph."""
    if borders.within:
        text = f"the logits of this loss come from outside of {borders.within}"
        return Refusal(Reason.NO_HEAD, loss, text, ONE_BLOCK)
    if borders.break_before:
        text = f"the logits of this loss come from another graph, before a graph break: {borders.break_before}"
        return Refusal(Reason.NO_HEAD, loss, text, NO_BREAK)
    return Refusal(Reason.NO_HEAD, loss, "the logits of this loss come from outside the graph")


def without_loss(borders: Borders, head: Node) -> Refusal:
    """Return the refusal of logits that leave their graph before a loss reads them."""
    if borders.within:
        text = f"the logits leave {borders.within}, and no loss stands behind them in it"
        return Refusal(Reason.NO_LOSS, head, text, ONE_BLOCK)
    if borders.break_after:
        text = f"the logits leave the graph at a graph break, and no loss stands before it: {borders.break_after}"
        return Refusal(Reason.NO_LOSS, head, text, NO_BREAK)
    if borders.break_before:
        text = f"the logits leave the part of the function after a graph break, without a loss: {borders.break_before}"
        return Refusal(Reason.NO_LOSS, head, text, f"{Reason.NO_LOSS.value} If it is behind the break, remove that.")
    return Refusal(Reason.NO_LOSS, head, "the logits leave the graph, and no loss stands behind them")


def outputs_of(growth: Growth) -> list[Node]:
    """Return the values that the rest of the graph reads, without the large values that are returned."""
    outputs = (node for node in growth.nodes if not growth.nodes.issuperset(node.users))
    return [node for node in outputs if node not in growth.returned]
