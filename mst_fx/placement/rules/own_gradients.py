"""Functions that bring gradients of their own: the gradient of each operand has to lie as that operand asks.

A chunk's gradient of a split value is that chunk's part of the gradient, of a whole value a summand of it, and of a
partial sum all of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch.fx import Node

from mst_fx.core.graph_walk import descendants
from mst_fx.ops.own_gradients import own_gradients, own_of, upstream
from mst_fx.placement.placement import PARTIAL, WHOLE, Placement, Split
from mst_fx.placement.rules.linear import is_zero, proportional
from mst_fx.placement.rules.registry import Demand, Flow, mixed, rule


def of_gradient(placement: Placement) -> Placement:
    """Return how the gradient of a value lies that lies so."""
    opposite: dict[Placement, Placement] = {WHOLE: PARTIAL, PARTIAL: WHOLE}
    return opposite.get(placement, placement)


@rule(upstream)
def comes_back(node: Node, flow: Flow) -> Placement:
    """The gradient that comes back to a value."""
    return of_gradient(flow.of(node.args[0]))


@rule(own_gradients)
def brings(node: Node, flow: Flow) -> tuple[Placement, ...]:
    """The values lie as they do."""
    return tuple(map(flow.of, own_of(node).values))


def check_gradients(node: Node, flow: Flow) -> None:
    """Raise a refusal, or a `Demand`, unless each gradient that a function brings lies as that of its operand."""
    own = own_of(node)
    for operand, gradient in zip(own.operands, own.gradients, strict=True):
        _check_gradient(operand, gradient, flow)


def _check_gradient(operand: Node, gradient: Node, flow: Flow) -> None:
    """Raise a refusal, or a `Demand`, for a gradient that does not lie as that of the operand."""
    placed, given = flow.of(operand), flow.of(gradient)
    if given == of_gradient(placed) or (given == WHOLE and is_zero(gradient)):
        return
    if given == WHOLE and isinstance(placed, Split):
        raise Demand(gradient, placed)
    if placed == WHOLE and isinstance(given, Split):
        raise Demand(operand, given)
    if given == placed == WHOLE:
        raise mixed(gradient, "gives each chunk the whole gradient of a whole value")
    text = "adds up over the axis" if given == PARTIAL else f"gives a gradient placed as {given}"
    raise mixed(gradient, f"{text}, and is the gradient of a value placed as {placed}")


def tied_to_chunks(nodes: list[Node]) -> set[Node]:
    """Return the nodes that only a loop can run: those with gradients of their own, and what is made of them."""
    return descendants(node for node in nodes if node.target in (upstream, own_gradients))


def scales_with_upstream(loop: Iterable[Node], backward: Sequence[Node]) -> bool:
    """Return whether all gradients that functions bring are twice as large where those that come back are.

    Args:
        loop: nodes that hold the functions.
        backward: the nodes that only their gradients are made of, in graph order.
    """
    scaled = proportional(backward, [node for node in backward if node.target == upstream])
    gradients = [gradient for node in loop if node.target == own_gradients for gradient in own_of(node).gradients]
    return all(gradient in scaled or is_zero(gradient) for gradient in gradients)
