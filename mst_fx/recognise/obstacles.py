"""Why a node of a captured graph must not be in a region, and why matches gave up: what the report tells of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import nullcontext

import torch
from torch.fx import Node

from mst_fx.capture.decomposed import Decomposed
from mst_fx.core.aten_ops import ATTENTIONS
from mst_fx.core.graph_walk import descendants
from mst_fx.core.provenance import op_name
from mst_fx.core.refusal import Reason, Refusal
from mst_fx.core.torch_private.captured import is_transformed
from mst_fx.core.values import fake_value, tensors_of
from mst_fx.ops.own_gradients import upstream
from mst_fx.placement.propagate import forbid_effects, forbid_unruled, in_the_backward
from mst_fx.recognise.decomposed_nodes import strange_tensors
from mst_fx.recognise.effects import writes

aten = torch.ops.aten

REPEATED = frozenset(["tag_activation_checkpoint", "wrap_activation_checkpoint"])
"""Operators that run a subgraph, and run it again in the backward."""

CHECKPOINT_ADVICE = "Checkpoint the whole MLP, or the head with its loss, or neither: a loop recomputes in any case."


class Unmatched:
    """Why matches gave up, by the nodes that they had seen.

    Args:
        order: the position of each node in its graph.
    """

    def __init__(self, order: Mapping[Node, int]) -> None:
        self._order = order
        self._refused: dict[Node, Refusal] = {}
        self._given_up: dict[Node, tuple[int, Refusal]] = {}

    def refuse(self, nodes: Iterable[Node], refusal: Refusal) -> None:
        """Store why nodes are not looped that look like a region."""
        for node in nodes:
            self._refused.setdefault(node, refusal)

    def give_up(self, nodes: Iterable[Node], refusal: Refusal, start: Node | None = None) -> None:
        """Store why nodes are none of a region; that of a refusal comes before it.

        Args:
            nodes: what the match has seen.
            refusal: the reason.
            start: where the match began, None if nowhere in particular. Of several matches that have seen a node, the
                one that began nearest before it tells the reason, and of those that began there, the first.
        """
        begun = -1 if start is None else self._order[start]
        for node in nodes:
            nearness = begun if begun <= self._order[node] else -1
            if node not in self._given_up or self._given_up[node][0] < nearness:
                self._given_up[node] = (nearness, refusal)

    def about(self, node: Node) -> Refusal | None:
        """Return why a node is in no region, None where no match has come across it."""
        return self._refused.get(node) or self._given_up.get(node, (0, None))[1]


def obstacle_in(node: Node, decomposed: Decomposed | None, activation: Node | None = None) -> Refusal | None:
    """Return why a region must not contain a node; None where each of its ops has a placement rule.

    Args:
        node: of the captured graph.
        decomposed: its aten ops, None where it has none.
        activation: the operand that carries the tokens, None where any operand may.
    """
    if (strange := strange_tensors(node)) is not None:
        return strange
    if decomposed is None:
        return _closed(node)
    if any(op.op == "get_attr" for op in (*decomposed.ops, *decomposed.backward)):
        return Refusal(Reason.UNKNOWN_OP, node, f"{op_name(node)} holds a constant tensor")
    try:
        _forbid(node, decomposed, activation)
    except Refusal as refusal:
        return Refusal(refusal.reason, node, f"{op_name(node)}: {refusal.text}")
    return None


def _forbid(node: Node, decomposed: Decomposed, activation: Node | None) -> None:
    """Raise a refusal for an op that has effects, or has no placement rule and reads tokens."""
    # decomposed alone, a write to an operand ends in a copy into it; in a region the operand is an ordinary value
    written = aten.copy_.default if writes(node) else None
    both = (*decomposed.ops, *decomposed.backward)
    ops = [op for op in both if op.op == "call_function" and op.target != written]
    tokens = both if activation is None else _made_of(node, decomposed, activation)
    # an op's effect is a better reason than a missing rule
    reading = [op for op in ops if op in tokens]
    for forbid, forbidden in ((forbid_effects, ops), (forbid_unruled, reading), (_forbid_attention, reading)):
        for op in forbidden:
            with in_the_backward() if op in decomposed.backward else nullcontext():
                forbid(op)


def _forbid_attention(op: Node) -> None:
    """Raise a refusal for attention: only regions over heads hold it, and these are found from it."""
    if op.target in ATTENTIONS:
        raise Refusal(Reason.AXIS_MIXED, op, f"{op.target} lets tokens read one another")


def _made_of(node: Node, decomposed: Decomposed, activation: Node) -> set[Node]:
    """Return the ops that may read tokens: not those that unpack the weight of a contraction, which run once."""
    position = node.all_input_nodes.index(activation)
    starts = [given for given, place in decomposed.position_of.items() if place == position]
    return descendants([*starts, *(op for op in decomposed.backward if op.target == upstream)])


def _closed(node: Node) -> Refusal:
    """Return why a node has no aten ops."""
    name = op_name(node)
    if str(node.target) in REPEATED:
        return Refusal(Reason.SUBGRAPH, node, f"{name} is a checkpointed block", CHECKPOINT_ADVICE)
    if isinstance(node.target, torch._ops.HigherOrderOperator) and str(node.target) != "autograd_function_apply":
        return Refusal(Reason.SUBGRAPH, node, f"{name} runs a subgraph, which no region looks into")
    if any(is_transformed(x) for near in (node, *node.all_input_nodes) for x in tensors_of(near)):
        return Refusal(Reason.TRANSFORM, node, f"{name} runs inside a transform of torch.func (vmap, grad, jvp)")
    unseen = [operand for operand in node.all_input_nodes if operand.op == "placeholder"]
    unseen = [operand for operand in unseen if fake_value(operand) is None]
    if unseen:
        text = f"{name} reads {unseen[0].name}, of which Dynamo has left no example in the subgraph"
        return Refusal(Reason.NO_VALUE, node, text)
    return Refusal(Reason.UNKNOWN_OP, node, f"{name} cannot be decomposed into aten ops")
