"""The table of placement rules, and what a rule may ask and raise.

A rule is a function of the node and a `Flow`, which tells the operands' placements. It returns the placement of the
result (a tuple for several results), or raises a `Demand`, `Spans` or a `Refusal`. It never sees a `Partial` operand:
an op that reads a sum runs after the loop.
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

NodePlacement: TypeAlias = Placement | tuple[Placement, ...]


class Demand(Exception):  # noqa: N818 - control flow within propagation
    """`node`, which is whole so far, must be split for an op that reads it."""

    def __init__(self, node: Node, split: Split) -> None:
        super().__init__(f"{node} must be split as {split}")
        self.node = node
        self.split = split


class Spans(Exception):  # noqa: N818 - control flow within propagation
    """A view spreads the axis over several dims; `factors` are the factors of the axis that can be split instead.

    Each factor is a pair (outer, inner), relative to the axis.
    """

    def __init__(self, node: Node, factors: list[tuple[int, int]]) -> None:
        super().__init__(f"{node} spreads the axis over several dims")
        self.node = node
        self.factors = factors


class Flow(Protocol):
    """What a rule may ask."""

    def of(self, arg: Any) -> Placement:
        """Return the placement of an operand; whole for anything that is no tensor."""
        ...


Rule: TypeAlias = Callable[[Node, Flow], NodePlacement]
_RULES: dict[Any, Rule] = {}


def rule(*targets: Any) -> Callable[[Rule], Rule]:
    """Register the decorated function as the rule of these op overloads.

    Raises:
        ValueError: one of them has a rule already.
    """

    def register(function: Rule) -> Rule:
        for target in targets:
            if target in _RULES:
                raise ValueError(f"two placement rules for {target}")
            _RULES[target] = function
        return function

    return register


def rule_for(target: Any) -> Rule | None:
    """Return the rule of an op, None if it has none."""
    if target in _RULES:
        return _RULES[target]
    return _RULES["pointwise"] if is_pointwise(target) else None


Back: TypeAlias = Callable[[Node, Split], dict[Node, Split]]
_BACKS: dict[Any, Back] = {}


def back(*targets: Any) -> Callable[[Back], Back]:
    """Register the decorated function, which tells how the operands of these ops must be split for a split result.

    Such a function returns the demands on the operands; none where the op can make the rows of one chunk alone. The
    demands are only a guess: the rules decide.
    """

    def register(function: Back) -> Back:
        _BACKS.update(dict.fromkeys(targets, function))
        return function

    return register


def demands_of(node: Node, split: Split) -> dict[Node, Split]:
    """Return how the operands of a node must be split for its result to lie as `split`.

    Raises:
        Refusal: no operand can be split so.
    """
    if node.target is operator.getitem:
        node = args_of(node)[0]  # one of several results: all of them are split alike
    if node.target in _BACKS:
        return _BACKS[node.target](node, split)
    if is_pointwise(node.target):
        return _BACKS["pointwise"](node, split)
    alike = [operand for operand in node.all_input_nodes if same_shape(shape_of(operand), result_shape(node))]
    if node.op != "call_function" or not alike:
        raise mixed(node, "is needed split, but its operands are whole")
    return dict.fromkeys(alike, split)


def shape_of(arg: Any) -> tuple[int, ...]:
    """Return the shape of a node's tensor, () for anything else."""
    value = arg.meta.get("val") if isinstance(arg, Node) else None
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()


def result_shape(node: Node) -> tuple[int, ...]:
    """Return the shape of a node's result, of the first one where there are several."""
    value = node.meta["val"]
    return tuple((value[0] if isinstance(value, tuple | list) else value).shape)


def args_of(node: Node) -> tuple[Any, ...]:
    """Return the positional arguments of an op's schema: as given, also by keyword, or their defaults.

    They are untyped here: the rule of an op knows their types.
    """
    if not isinstance(node.target, torch._ops.OpOverload):
        return node.args
    missing = _positional(node.target)[len(node.args) :]
    return (*node.args, *(node.kwargs.get(name, default) for name, default in missing))


def argument(node: Node, name: str) -> Any:
    """Return an argument of an aten op by its name, or its default where it is left out."""
    position, default = _arguments(node.target)[name]
    if position is not None and position < len(node.args):
        return node.args[position]
    return node.kwargs.get(name, default)


def takes(node: Node, name: str) -> bool:
    """Return whether an aten op has an argument of this name."""
    return name in _arguments(node.target)


@cache
def _positional(op: torch._ops.OpOverload) -> list[tuple[str, Any]]:
    return [(given.name, given.default_value) for given in op._schema.arguments if not given.kwarg_only]


@cache
def _arguments(op: Any) -> dict[str, tuple[int | None, Any]]:
    """Return the position (None for a keyword-only one) and the default of each argument of an op, by name."""
    return {
        given.name: (None if given.kwarg_only else position, given.default_value)
        for position, given in enumerate(op._schema.arguments)
    }


def mixed(node: Node, text: str) -> Refusal:
    """Return the refusal of an op that makes positions of the axis depend on one another."""
    return Refusal(Reason.AXIS_MIXED, node, f"{node.target} {text}")
