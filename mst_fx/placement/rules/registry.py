"""The table of placement rules, and what a rule may ask and raise.

A rule is a function of the node and a `Flow`, which tells the operands' placements. It returns the placement of the
result (a tuple for several results) or raises a `Demand` or a `Refusal`. It never sees a `Partial` operand: what reads
a sum runs after the loop.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import cache
from typing import Any, Protocol, TypeAlias

import torch
from torch.fx import Node

from mst_fx.core.aten_ops import is_pointwise
from mst_fx.core.refusal import Reason, Refusal
from mst_fx.placement.placement import Placement, Split, same_shape

Result: TypeAlias = Placement | tuple[Placement, ...]


class Demand(Exception):  # noqa: N818 - control flow within propagation
    """`node`, so far whole, must be split for its user's sake."""

    def __init__(self, node: Node, split: Split) -> None:
        super().__init__(f"{node} must be split as {split}")
        self.node = node
        self.split = split


class Spans(Exception):  # noqa: N818 - control flow within propagation
    """A view spreads the axis over several dims; `parts` are the factors that it can be cut along instead.

    Each part is (outer, inner), relative to the axis.
    """

    def __init__(self, node: Node, parts: list[tuple[int, int]]) -> None:
        super().__init__(f"{node} spreads the axis over several dims")
        self.node = node
        self.parts = parts


class Flow(Protocol):
    """What a rule may ask."""

    def of(self, arg: Any) -> Placement:
        """Placement of an operand; whole for anything that is no tensor."""
        ...


Rule: TypeAlias = Callable[[Node, Flow], Result]
_RULES: dict[Any, Rule] = {}


def rule(*targets: Any) -> Callable[[Rule], Rule]:
    """Register the decorated function for these op overloads."""

    def register(function: Rule) -> Rule:
        for target in targets:
            if target in _RULES:
                raise ValueError(f"two placement rules for {target}")
            _RULES[target] = function
        return function

    return register


def rule_for(target: Any) -> Rule | None:
    """The rule of an op, None where there is none."""
    if target in _RULES:
        return _RULES[target]
    return _RULES["pointwise"] if is_pointwise(target) else None


Back: TypeAlias = Callable[[Node, Split], dict[Node, Split]]
_BACKS: dict[Any, Back] = {}


def back(*targets: Any) -> Callable[[Back], Back]:
    """Register how the operands of these ops must be split for a result split as demanded.

    Such a function returns the demands on the operands; none at all where the op can make the part by itself. What it
    says is only a guess to try: the forward rules judge it.
    """

    def register(function: Back) -> Back:
        _BACKS.update(dict.fromkeys(targets, function))
        return function

    return register


def demands_of(node: Node, split: Split) -> dict[Node, Split]:
    """What a demand on a node asks of its operands.

    Raises:
        Refusal: no operand can bring the split.
    """
    if node.target is operator.getitem:
        node = args_of(node)[0]  # one of several results: all of them lie alike
    if node.target in _BACKS:
        return _BACKS[node.target](node, split)
    if is_pointwise(node.target):
        return _BACKS["pointwise"](node, split)
    alike = [operand for operand in node.all_input_nodes if same_shape(shape_of(operand), result_shape(node))]
    if node.op != "call_function" or not alike:
        raise mixed(node, "is needed split, but its operands are whole")
    return dict.fromkeys(alike, split)


def shape_of(arg: Any) -> tuple[int, ...]:
    """Shape of a tensor node, () for anything else."""
    value = arg.meta.get("val") if isinstance(arg, Node) else None
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()


def result_shape(node: Node) -> tuple[int, ...]:
    """Shape of the value, of the first one where there are several."""
    value = node.meta["val"]
    return tuple((value[0] if isinstance(value, tuple | list) else value).shape)


def args_of(node: Node) -> tuple[Any, ...]:
    """The positional arguments of the schema, as given, by keyword as well, or by default.

    The rule of an op knows their types better than fx does.
    """
    if not isinstance(node.target, torch._ops.OpOverload):
        return node.args
    missing = _positional(node.target)[len(node.args) :]
    return (*node.args, *(node.kwargs.get(name, default) for name, default in missing))


def argument(node: Node, name: str) -> Any:
    """An argument of an aten op by its name, its default where it is left out."""
    position, default = _arguments(node.target)[name]
    if position is not None and position < len(node.args):
        return node.args[position]
    return node.kwargs.get(name, default)


def takes(node: Node, name: str) -> bool:
    """Whether an aten op has an argument of this name."""
    return name in _arguments(node.target)


@cache
def _positional(op: torch._ops.OpOverload) -> list[tuple[str, Any]]:
    return [(given.name, given.default_value) for given in op._schema.arguments if not given.kwarg_only]


@cache
def _arguments(op: Any) -> dict[str, tuple[int | None, Any]]:
    """Position, None for those that have none, and default of the arguments of an op."""
    return {
        given.name: (None if given.kwarg_only else position, given.default_value)
        for position, given in enumerate(op._schema.arguments)
    }


def mixed(node: Node, text: str) -> Refusal:
    """The refusal of an op that makes the tokens depend on one another."""
    return Refusal(Reason.AXIS_MIXED, node, f"{node.target} {text}")
