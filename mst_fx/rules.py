"""Placement rules for ops that the pass does not know: `register_rule` gives one, `check_rule` proves it.

An op needs a rule where it reads a value that is split into chunks; an op of whole operands needs none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from mst_fx.core.aten_ops import is_mutable
from mst_fx.placement.rules import pointwise, reduction, rule_for
from mst_fx.placement.rules.registry import Back, Rule, back, rule
from mst_fx.placement.rules.rows import by_rows, by_rows_back
from mst_fx.verify.by_chunks import Program, check


@dataclass(frozen=True)
class Family:
    """What ops of one kind have in common: how they move the axis. `passes/README.md` tells how to write one.

    Attributes:
        rule: returns the placement of the results, given those of the operands, or raises a refusal.
        back: returns how the operands have to be split for a result that has to be split.
    """

    rule: Rule
    back: Back


ELEMENTWISE = Family(pointwise.pointwise, pointwise.aligned)
"""Each element of the result is made of the elements in the same place; operands broadcast."""
SUM = Family(reduction.total, reduction.reduce_back)
"""Sums of the first operand over its argument `dim`, over all dims if it has none: they add up over the chunks."""
REDUCTION = Family(reduction.reduce, reduction.reduce_back)
"""The same dims, in any other way."""
SCAN = Family(reduction.along, reduction.along_back)
"""Values of the same shape, made along the argument `dim`: cumulative sums, softmax."""


def rows(features: int = 1) -> Family:
    """Return the family of ops that compute each row by itself: a norm, a rotation, a quantisation of a token.

    Args:
        features: how many dims at the end of the first operand make up a row. Operands with the same dims in front of
            these have rows as well; all others are weights. Results keep the dims in front, and may have other rows.
    """
    if features < 0:
        raise ValueError(f"mst_fx: a row has {features} dims")
    return Family(by_rows(features), by_rows_back(features))


def register_rule(op: Any, family: Family) -> None:
    """Give an op a placement rule, for every later compile.

    Args:
        op: an overload, as `torch.ops.<library>.<op>.default`.
        family: ELEMENTWISE, SUM, REDUCTION, SCAN, `rows(...)`, or one of your own. The backward of the op has to be of
            the same kind: it runs on the values of one chunk. `check_rule` shows whether it is.

    Raises:
        TypeError: `op` is no overload.
        ValueError: the op has a rule already, or writes to an operand.
    """
    if not isinstance(op, torch._ops.OpOverload):
        raise TypeError(f"mst_fx: {op} is no overload of an op; take torch.ops.<library>.<op>.default")
    if is_mutable(op):
        raise ValueError(f"mst_fx: {op} writes to an operand, which no rule allows")
    if rule_for(op) is not None:
        raise ValueError(f"mst_fx: {op} has a rule already")
    rule(op)(family.rule)
    back(op)(family.back)


def check_rule(op: Any, *args: Any, **kwargs: Any) -> int:
    """Check the rule of an op on one call: what the rule accepts, chunk by chunk, gives what the whole gives.

    Each tensor is split along each of its dims, and by factors of it; then the results are needed split. Results and,
    for tensors that need a gradient, gradients are compared: float64 within 1e-10, float32 within 1e-4.

    Args:
        op: an overload that has a rule.
        *args: its arguments, with small tensors on any device: a dim of 6 or 12 positions has several factors.
        **kwargs: keyword arguments.

    Returns:
        The number of splits that the rule accepts. It is 0 for a rule that refuses all of them.

    Raises:
        ValueError: the op has no rule.
        AssertionError: the chunks do not make up the whole; the message names the op and the split.
    """
    if rule_for(op) is None:
        raise ValueError(f"mst_fx: {op} has no rule")
    return _splits_of_operands(op, args, kwargs) + _splits_of_results(op, args, kwargs)


def _called(program: Program, op: Any, args: Any, kwargs: Any) -> Any:
    """Return the results of the call, with an input of the program for each of its tensors."""
    given, named = tree_map_only(torch.Tensor, program.input, (args, kwargs))
    return program.results(program.call(op, *given, **named))


def _splits_of_operands(op: Any, args: Any, kwargs: Any) -> int:
    program = Program()
    program.outputs = _called(program, op, args, kwargs)
    return check(program)["accepted"]


def _splits_of_results(op: Any, args: Any, kwargs: Any) -> int:
    """A value that is split is stacked on a result, so that the result has to be split, too."""
    accepted = 0
    for position in range(len(_called(Program(), op, args, kwargs))):
        program = Program()
        result = _called(program, op, args, kwargs)[position]
        if result.meta["val"].dim():
            other = program.input(result.meta["val"].clone())
            program.outputs = [program.call(torch.ops.aten.stack.default, [other, result])]
            accepted += check(program, [other])["accepted"]
    return accepted
