"""The symbols of sizes that are only known at run time; asking adds no guard.

Private torch API: all of torch's names in this file. Run on torch 2.11, 2.13 and 2.15.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv as ShapeEnv
from torch.fx.experimental.symbolic_shapes import is_concrete_int as is_concrete_int
from torch.fx.experimental.symbolic_shapes import statically_known_true as statically_known_true
from torch.utils._sympy.functions import CeilToInt, FloorDiv, IntTrueDiv
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis


def formula_of(number: Any) -> Any:
    """Return the sympy formula of a number that varies."""
    return number.node.expr


def captured_value(number: Any) -> Any:
    """Return the value of a number when the graph was captured; None where it depends on the data.

    That is so for the size of a ragged dim, too.
    """
    return None if number.node.is_nested_int() or not number.node.has_hint() else number.node.hint


def captured_symbols(number: Any) -> Mapping[Any, Any]:
    """Return the captured values of all symbols of the graph that a size belongs to."""
    return number.node.shape_env.backed_var_to_val


def largest_value(symbol: Any, number: Any) -> Any:
    """Return the largest value that a symbol of a size may have."""
    return number.node.shape_env.var_to_range[symbol].upper


def is_fixed(size: torch.SymInt) -> bool:
    """Return whether the formula of a size is a plain number."""
    return size.node.maybe_as_int() is not None


def size_of(formula: Any, value: Any, number: Any) -> Any:
    """Return a formula over symbols of the size `number` as a size, with a captured value."""
    return number.node.shape_env.create_symintnode(formula, hint=value)


def computed(formula: Any, values: Mapping[Any, Any]) -> Any:
    """Return the value of a formula, where its symbols have these values: sizes that a trace knows."""
    if formula.has(CeilToInt):  # which torch computes of numbers alone
        formula = formula.replace(
            _rounds_up, lambda rounded: -FloorDiv(-rounded.args[0].args[0], rounded.args[0].args[1])
        )
    return sympy_interp(PythonReferenceAnalysis, dict(values), formula)


def _rounds_up(formula: Any) -> bool:
    """Return whether a formula is a quotient of integers, rounded up."""
    return isinstance(formula, CeilToInt) and isinstance(formula.args[0], IntTrueDiv)


def guards_of(number: Any) -> Sequence[Any]:
    """Return the conditions that were assumed so far about symbols of the graph that a size belongs to."""
    return [guard.expr for guard in number.node.shape_env.guards]


def size_without_value(shape_env: ShapeEnv) -> Any:
    """Return a new size that has no captured value, so that torch cannot specialise on one."""
    with shape_env.ignore_fresh_unbacked_symbols():
        return shape_env.create_unbacked_symint()
