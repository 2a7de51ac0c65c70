"""Aten graph, split axis -> the placement of every value, or a refusal.

1. Guess: the given placeholders are split, everything else is whole.
2. Walk forward through the rules.
3. A rule that needs a whole operand split raises a demand: follow it back to the placeholders (or to an op that can
   make the rows of one mini-sequence by itself), split those too, and walk again.
4. What reads a partial sum belongs to the epilogue, which runs once, after the loop.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from mst_fx.lower import is_size
from mst_fx.placement import PARTIAL, WHOLE, Placement, Split
from mst_fx.refusal import Reason, Refusal
from mst_fx.rules import Demand, Result, args_of, demands_of, mixed, rule_for
from mst_fx.rules.creation import FILLS


@dataclass(frozen=True)
class Placements:
    """The outcome: where each value lies.

    Attributes:
        of: placement of each node that runs before or in the loop (a tuple for several results).
        epilogue: the nodes that run once, after the loop, in graph order.
    """

    of: Mapping[Node, Result]
    epilogue: tuple[Node, ...]


def propagate(graph: Graph, seeds: Mapping[Node, Split]) -> Placements:
    """Place every value of `graph` when the placeholders `seeds` are split.

    Raises:
        Refusal: an op without a rule, or one that makes positions of the axis depend on one another.
        Spans: the axis must be cut along a part of it.
    """
    for node in graph.nodes:
        forbid_effects(node)
    forced: dict[Node, Split] = dict(seeds)
    while True:
        try:
            return _walk(graph, forced)
        except Demand as demand:
            origins = _origins(demand.node, demand.split)
            if all(forced.get(node) == split for node, split in origins.items()):
                raise mixed(demand.node, "is needed both whole and split") from None
            for node, split in origins.items():
                if forced.setdefault(node, split) != split:
                    raise mixed(node, f"is needed split as {forced[node]} and {split}") from None


class _Walk:
    def __init__(self) -> None:
        self.placements: dict[Node, Result] = {}

    def of(self, arg: Any) -> Placement:
        if not isinstance(arg, Node):
            return WHOLE
        placement = self.placements[arg]
        assert not isinstance(placement, tuple)
        return placement


def _walk(graph: Graph, forced: Mapping[Node, Split]) -> Placements:
    flow = _Walk()
    epilogue: dict[Node, None] = {}
    for node in graph.nodes:
        if node.op == "output":
            break
        if any(operand in epilogue or flow.placements[operand] == PARTIAL for operand in node.all_input_nodes):
            _check_epilogue(node, flow.placements, epilogue)
            epilogue[node] = None
            continue
        if node in forced and node.target not in FILLS:  # a fill reads no more than its operand's dtype
            _check_forced(node, flow)
        flow.placements[node] = forced.get(node) or _place(node, flow)
    return Placements(flow.placements, tuple(epilogue))


def _check_forced(node: Node, flow: _Walk) -> None:
    """What makes a part by itself must not read parts of something."""
    if any(flow.placements[operand] != WHOLE for operand in node.all_input_nodes):
        raise mixed(node, "is needed split one way, and its operand is split another way")


def _place(node: Node, flow: _Walk) -> Result:
    if node.op == "placeholder":
        return WHOLE
    if node.op != "call_function":
        raise Refusal(Reason.UNKNOWN_OP, node, f"{node.op} {node.target} stands in the region")
    if is_size(node.meta.get("val")):
        return WHOLE  # a size of the whole; what is split takes its sizes from the chunk
    if node.target is operator.getitem:
        source, index = args_of(node)
        placement = flow.placements[source]
        return placement[index] if isinstance(placement, tuple) else placement
    rule = rule_for(node.target)
    if rule is None:
        if all(flow.placements[operand] == WHOLE for operand in node.all_input_nodes):
            return WHOLE
        raise Refusal(Reason.UNKNOWN_OP, node, f"{node.target} has no placement rule")
    return rule(node, flow)


def forbid_unruled(node: Node) -> None:
    """Raise a refusal for an aten node that has no placement rule."""
    if is_size(node.meta.get("val")) or node.target is operator.getitem:
        return
    if rule_for(node.target) is None:
        raise Refusal(Reason.UNKNOWN_OP, node, f"{node.target} has no placement rule")


def forbid_effects(node: Node) -> None:
    """Raise a refusal for an aten node that draws random numbers or writes to an operand."""
    if isinstance(node.target, torch._ops.OpOverload):
        if torch.Tag.nondeterministic_seeded in node.target.tags:
            raise Refusal(Reason.RANDOM, node, f"{node.target} draws random numbers, which a recompute cannot replay")
        if node.target._schema.is_mutable:
            raise Refusal(Reason.MUTATION, node, f"{node.target} writes to its operand")


def _check_epilogue(node: Node, placements: Mapping[Node, Result], epilogue: Mapping[Node, None]) -> None:
    for operand in node.all_input_nodes:
        if operand not in epilogue and isinstance(placements[operand], Split):
            text = f"{node.target} needs a sum over the axis and every position of it"
            raise Refusal(Reason.TWO_PASSES, node, text)


def _origins(node: Node, split: Split) -> dict[Node, Split]:
    """The placeholders and self-made values to split so that `node` comes out as `split`."""
    if node.op == "placeholder":
        return {node: split}
    demands = demands_of(node, split)
    found: dict[Node, Split] = {} if demands else {node: split}
    for operand, demanded in demands.items():
        found |= _origins(operand, demanded)
    return found
