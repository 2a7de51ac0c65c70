"""Ops that compute each row by itself, as norms, rotations and quantisations of a token do.

Terms
  row    the last dims of an operand, `features` of them; the dims in front count the rows
"""

from __future__ import annotations

from typing import Any

from torch.fx import Node

from mst_fx.placement.placement import WHOLE, Split, same_shape
from mst_fx.placement.rules.registry import Back, Demand, Flow, NodePlacement, Rule, args_of, mixed, shape_of


def by_rows(features: int) -> Rule:
    """Return the rule of an op whose rows are the last `features` dims of its first operand.

    Operands with the same dims in front of their rows are split alike; all others, such as weights, have to be whole.
    Every result keeps the dims in front.
    """

    def rule(node: Node, flow: Flow) -> NodePlacement:
        split = next((flow.of(x) for x in _with_rows(node, features) if isinstance(flow.of(x), Split)), WHOLE)
        if isinstance(split, Split) and split.dim >= len(_in_front(node, features)):
            raise mixed(node, "computes with all values of a row, and rows are split")
        for operand in node.all_input_nodes:
            _check(node, operand, flow, split if operand in _with_rows(node, features) else WHOLE)
        value = node.meta["val"]
        return (split,) * len(value) if isinstance(value, tuple | list) else split

    return rule


def by_rows_back(features: int) -> Back:
    """Return how the operands of such an op have to be split."""

    def back(node: Node, split: Split) -> dict[Node, Split]:
        if split.dim >= len(_in_front(node, features)):
            raise mixed(node, "computes with all values of a row, and is needed split within rows")
        return dict.fromkeys(_with_rows(node, features), split)

    return back


def _check(node: Node, operand: Node, flow: Flow, expected: Any) -> None:
    """Raise an error unless an operand is placed as expected: a demand, or a refusal if it is split already."""
    placement = flow.of(operand)
    if placement == WHOLE and isinstance(expected, Split):
        raise Demand(operand, expected)
    if placement != expected:
        raise mixed(node, f"reads a value split as {placement} beside rows split as {expected}")


def _in_front(node: Node, features: int) -> tuple[int, ...]:
    """Return the sizes in front of a row of the first operand."""
    shape = shape_of(args_of(node)[0])
    return shape[: max(0, len(shape) - features)]


def _with_rows(node: Node, features: int) -> list[Node]:
    """Return the operands that hold as many rows as the first one."""
    front = _in_front(node, features)
    operands = [operand for operand in node.all_input_nodes if len(shape_of(operand)) >= len(front)]
    return [operand for operand in operands if front and same_shape(shape_of(operand)[: len(front)], front)]
