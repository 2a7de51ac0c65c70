"""Aten graph, split axis -> the placement of every value, or a refusal.

1. Guess that the given placeholders are split and everything else is whole.
2. Walk forward through the rules.
3. A rule that needs a whole operand split raises a demand: follow it back to the placeholders (or to an op that can
   make the rows of one chunk alone), split those too, and walk again.
4. A partial sum stays one through linear ops; any other op that reads it belongs to the epilogue, which runs once,
   after the loop.
5. A sum that does not depend on the given placeholders (a count of labels) is whole: it is computed before the loop.
   But of the keys of sorted rows, each chunk counts its own.
"""

from __future__ import annotations

import operator
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Graph, Node

from mst_fx.core.aten_ops import CASTS, DRAWS, FILLS, MADE_IN_CHUNKS, VIEWS, is_mutable, is_random
from mst_fx.core.graph_walk import ancestors
from mst_fx.core.refusal import Reason, Refusal
from mst_fx.core.sizes import depends_on_data, hint, is_size, sure
from mst_fx.ops.own_gradients import only_for_gradients, own_gradients, read_forward, upstream
from mst_fx.placement.placement import PARTIAL, WHOLE, Placement, Split
from mst_fx.placement.rules import (
    Demand,
    NodePlacement,
    args_of,
    argument,
    casts,
    check_gradients,
    count,
    demands_of,
    is_linear,
    made_for_counts,
    mixed,
    route,
    rule_for,
    shape_of,
    takes,
)


@dataclass(frozen=True)
class Placements:
    """Where each value of a graph lies.

    Attributes:
        of: placement of each node that runs before or in the loop (a tuple for several results).
        epilogue: the nodes that run once, after the loop, in graph order.
        made: values that are made whole before the loop and then split.
    """

    of: Mapping[Node, NodePlacement]
    epilogue: tuple[Node, ...]
    made: frozenset[Node] = frozenset()


class Unequal(Exception):  # noqa: N818 - control flow within the analysis
    """Two sizes that vary must be equal for a region to be split; they were when the graph was captured.

    Attributes:
        node: the node whose value has the first size.
        size: the size of the dim that must hold the axis.
        needed: the size that the axis needs there.
    """

    def __init__(self, node: Node, size: Any, needed: Any) -> None:
        super().__init__(f"{node} has {size} positions where the axis has {needed}")
        self.node = node
        self.size = size
        self.needed = needed


def propagate(graph: Graph, seeds: Mapping[Node, Split], until: Node | None = None) -> Placements:
    """Place every value of `graph` (in front of `until`, if given), where the values of `seeds` are split.

    Raises:
        Refusal: an op has no rule, or makes positions of the axis depend on one another.
        Spans: only a factor of the axis can be split.
        Unequal: two sizes have to be made equal first.
    """
    nodes = [node for node in graph.nodes if node.op != "output"]
    if until is not None:
        nodes = nodes[: nodes.index(until)]
    backward = frozenset(only_for_gradients(graph))
    try:
        return _propagated(nodes, backward, seeds)
    except Refusal as refusal:
        if refusal.node not in backward:
            raise
        with in_the_backward():
            raise


@contextmanager
def in_the_backward() -> Iterator[None]:
    """Say in the text of a refusal that its op stands in a function's own backward."""
    try:
        yield
    except Refusal as refusal:
        raise Refusal(refusal.reason, refusal.node, f"{refusal.text}, in a backward of its own") from None


def _propagated(nodes: Sequence[Node], backward: Container[Node], seeds: Mapping[Node, Split]) -> Placements:
    for node in nodes:
        forbid_effects(node)
    forced: dict[Node, Split] = dict(seeds)
    while True:
        try:
            return _walk(nodes, backward, frozenset(seeds), forced)
        except Demand as demand:
            found = origins(demand.node, demand.split)
            if all(forced.get(node) == split for node, split in found.items()):
                raise mixed(demand.node, "is read whole by one op, and chunk by chunk by another") from None
            for node, split in found.items():
                _check_fits(node, split, seeds)
                if forced.setdefault(node, split) != split:
                    dims = f"dim {forced[node].dim} by one op, and along dim {split.dim} by another"
                    raise mixed(node, f"is read chunk by chunk along {dims}") from None


def _check_fits(node: Node, split: Split, seeds: Mapping[Node, Split]) -> None:
    """Raise an error unless a value that a demand would split has the axis; demands only guess that.

    Raises:
        Refusal: it has not.
        Unequal: it has only at the sizes that were captured.
    """
    seed, axis = next(iter(seeds.items()))
    shape = shape_of(node)
    if split.dim < len(shape):
        size, needed = shape[split.dim], split.outer * axis.axis_length(shape_of(seed)) * split.inner
        if sure(size == needed):
            return
        if hint(size) == hint(needed) and not (depends_on_data(size) or depends_on_data(needed)):
            raise Unequal(node, size, needed)  # `gather` takes fewer rows than there are: it does not compare them
    raise mixed(node, f"is read chunk by chunk along dim {split.dim}, and is not as long as the tokens there")


class _Walk:
    def __init__(self) -> None:
        self.placements: dict[Node, NodePlacement] = {}

    def of(self, arg: Any) -> Placement:
        if not isinstance(arg, Node):
            return WHOLE
        placement = self.placements[arg]
        assert not isinstance(placement, tuple)
        return placement


def _walk(
    nodes: Sequence[Node], backward: Container[Node], seeds: frozenset[Node], forced: Mapping[Node, Split]
) -> Placements:
    flow = _Walk()
    epilogue: dict[Node, None] = {}
    dependent = set(seeds)
    forward = [node for node in nodes if node not in backward]
    of_each_chunk = made_for_counts(forward)
    for node in (*forward, *(node for node in nodes if node in backward)):  # the forward demands what it needs first
        operands = read_forward(node)
        if node.target == upstream or not dependent.isdisjoint(operands):
            dependent.add(node)
        casts_summands = (node in backward and casts(node)) or (node in of_each_chunk and node.target in CASTS)
        placement = _placed(node, flow, forced, casts_summands) if epilogue.keys().isdisjoint(operands) else None
        if placement is None:
            if node in backward or node.target == own_gradients:
                raise Refusal(Reason.TWO_PASSES, node, f"{node.target} needs a sum over the axis before it is complete")
            _check_epilogue(node, flow.placements, epilogue)
            epilogue[node] = None
            continue
        is_known = placement == PARTIAL and node not in dependent and node not in of_each_chunk
        known = is_known and _is_small(node, seeds)
        flow.placements[node] = WHOLE if known else placement
    for node in forward:
        if node.target == own_gradients:
            check_gradients(node, flow)
    made = (node for node in forced if node.op == "call_function" and node.target not in MADE_IN_CHUNKS)
    return Placements(flow.placements, tuple(epilogue), frozenset(made))


def _placed(node: Node, flow: _Walk, forced: Mapping[Node, Split], casts_summands: bool) -> NodePlacement | None:
    """Return a node's placement; None for a node that has to wait until a sum is complete.

    In a backward, a cast of a sum casts each summand: the gradient adds up in a dtype of its own. So do counts. An op
    that reads a size that varies waits: a body knows no sizes but those of its chunk.
    """
    if node.target in (upstream, own_gradients):
        return _place(node, flow)
    if (counts := count(node, flow)) is not None:
        return counts
    if any(flow.placements[operand] == PARTIAL for operand in node.all_input_nodes):
        varies = any(is_size(operand.meta.get("val")) for operand in node.all_input_nodes)
        return PARTIAL if (is_linear(node, flow) and not varies) or casts_summands else None
    if node in forced and node.target not in FILLS:  # a fill reads only its operand's dtype
        _check_forced(node, flow)
    return forced.get(node) or _place(node, flow)


def _is_small(node: Node, seeds: frozenset[Node]) -> bool:
    """Return whether nothing that a value is made from takes more memory than the largest seed; a view takes none."""
    limit = max(hint(seed.meta["val"].numel()) for seed in seeds)
    values = (made.meta.get("val") for made in ancestors([node]) if made.target not in VIEWS)
    return all(hint(value.numel()) <= limit for value in values if isinstance(value, torch.Tensor))


def _check_forced(node: Node, flow: _Walk) -> None:
    """Raise a refusal for an op that has to make the rows of one chunk alone, and reads a value that is not whole."""
    if any(flow.placements[operand] != WHOLE for operand in node.all_input_nodes):
        raise mixed(node, "is needed split one way, and its operand is split another way")


def _place(node: Node, flow: _Walk) -> NodePlacement:
    if node.op == "placeholder":
        return WHOLE
    if node.op != "call_function":
        raise Refusal(Reason.UNKNOWN_OP, node, f"{node.op} {node.target} stands in the region")
    if is_size(node.meta.get("val")):
        return WHOLE  # a size of the whole value; a split value takes its sizes from the chunk
    if node.target is operator.getitem:
        data, index = args_of(node)
        placement = flow.placements[data]
        return placement[index] if isinstance(placement, tuple) else placement
    routed = route(node, flow) if node.target not in (upstream, own_gradients) else None
    if routed is not None:
        return routed
    rule = rule_for(node.target)
    if rule is None:
        if all(flow.placements[operand] == WHOLE for operand in node.all_input_nodes):
            return WHOLE
        raise _unruled(node)
    return rule(node, flow)


def forbid_unruled(node: Node) -> None:
    """Raise a refusal for an aten node that has no placement rule."""
    if is_size(node.meta.get("val")) or node.target is operator.getitem:
        return
    if rule_for(node.target) is None:
        raise _unruled(node)


def _unruled(node: Node) -> Refusal:
    """Return the refusal of an op that has no placement rule, and can have none where its sizes depend on the data."""
    if torch.Tag.dynamic_output_shape in getattr(node.target, "tags", ()):
        return Refusal(Reason.DATA_DEPENDENT, node, f"{node.target} gives as many values as the data say")
    return Refusal(Reason.UNKNOWN_OP, node, f"{node.target} has no placement rule")


def forbid_effects(node: Node) -> None:
    """Raise a refusal for an aten node that draws random numbers or writes to an operand."""
    if is_random(node.target) and not (_draws_a_seed(node) or _drops_nothing(node)):
        raise Refusal(Reason.RANDOM, node, f"{node.target} draws random numbers, which a recompute cannot replay")
    if is_mutable(node.target):
        raise Refusal(Reason.MUTATION, node, f"{node.target} writes to its operand")


def _draws_a_seed(node: Node) -> bool:
    """Return whether a node draws one number for the whole region, as our own dropout does."""
    return node.target in DRAWS and argument(node, "size") in ([], ())


def _drops_nothing(node: Node) -> bool:
    """Return whether a node would draw random numbers, as attention does, for a dropout that it does not have."""
    return takes(node, "dropout_p") and argument(node, "dropout_p") == 0.0


def _check_epilogue(node: Node, placements: Mapping[Node, NodePlacement], epilogue: Mapping[Node, None]) -> None:
    for operand in node.all_input_nodes:
        if operand not in epilogue and placements[operand] not in (WHOLE, PARTIAL):
            text = f"{node.target} needs a sum over the axis and every position of it"
            raise Refusal(Reason.TWO_PASSES, node, text)


def origins(node: Node, split: Split) -> dict[Node, Split]:
    """Return the placeholders, and the values that a chunk makes alone, to split so that `node` lies as `split`."""
    if node.op == "placeholder":
        return {node: split}
    demands = demands_of(node, split)
    found: dict[Node, Split] = {} if demands else {node: split}
    for operand, demanded in demands.items():
        found |= origins(operand, demanded)
    return found
