"""Sizes that are known, and those that are only known at run time; asking adds no guard.

Private torch API: the symbols of sizes and their captured values. Run on torch 2.11, 2.13 and 2.15.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeAlias

import sympy  # type: ignore[import-untyped]
import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv, is_concrete_int, statically_known_true

VARYING = (torch.SymInt, torch.SymFloat, torch.SymBool)
sure = statically_known_true
"""Return whether a condition holds for all values of the sizes that are only known at run time."""

Hint: TypeAlias = Callable[[Any], int]
"""Gives a number for a size, where one is needed: `hint` or `long_hint`. Neither adds a guard."""

UNSEEN = 64
"""The hint of a size that depends on the data: it has no captured value, and the region is refused later anyway."""

LONG = 65536
"""Positions: at this length heads, and MLPs in checkpointed blocks, hold a large share of any model's memory."""


def hint(size: Any) -> int:
    """Return the value of a size when the graph was captured, or that which `mark_dynamic(hint_override=)` names."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    return int(size.node.hint) if size.node.has_hint() else UNSEEN


def long_hint(size: Any) -> int:
    """Return the same with LONG, or the largest value if that is smaller, for each symbol with a smaller hint."""
    if not isinstance(size, torch.SymInt) or not size.node.has_hint():
        return hint(size)
    formula, shape_env = size.node.expr, size.node.shape_env
    return int(formula.xreplace({symbol: _long_value(shape_env, symbol) for symbol in formula.free_symbols}))


def _long_value(shape_env: Any, symbol: Any) -> Any:
    return max(shape_env.backed_var_to_val[symbol], min(LONG, shape_env.var_to_range[symbol].upper))


def depends_on_data(size: Any) -> bool:
    """Return whether a size, or another number, had no value when the graph was captured."""
    return isinstance(size, VARYING) and not size.node.has_hint()


def is_size(value: Any) -> bool:
    """Return whether a value of a traced graph is a size or a list of sizes, not a tensor."""
    if isinstance(value, tuple | list):
        return all(map(is_size, value))
    return isinstance(value, (int, float, *VARYING))


def is_symbolic(size: Any) -> bool:
    """Return whether a size is only known at run time."""
    return isinstance(size, torch.SymInt) and size.node.maybe_as_int() is None


def number(size: Any) -> int | None:
    """Return a size as a number, where all symbols in it cancel; None where they do not."""
    return int(size) if is_concrete_int(size) else None


def expression(size: Any) -> Any:
    """Return the sympy formula of a size, or of another number that varies."""
    return size.node.expr if isinstance(size, VARYING) else sympy.sympify(size)


def seen_symbols(size: Any) -> dict[Any, Any]:
    """Return the symbols of a size, and the values that they had when the graph was captured."""
    return {symbol: size.node.shape_env.backed_var_to_val[symbol] for symbol in expression(size).free_symbols}


def alone(symbol: Any, holder: Any) -> Any:
    """Return a symbol of the size `holder` as a size of its own."""
    return holder.node.shape_env.create_symintnode(symbol, hint=int(seen_symbols(holder)[symbol]))


def in_terms_of(size: Any, known: Mapping[Any, Any]) -> Any:
    """Return a size, or another number, with formulas of `known` in place of symbols: a number where none is left."""
    if not isinstance(size, VARYING) or size.node.expr.free_symbols.isdisjoint(known):
        return size
    formula = size.node.expr.xreplace(known)
    if not isinstance(size, torch.SymInt):
        return size if formula.free_symbols else type(size.node.hint)(formula)
    return int(formula) if formula.is_number else size.node.shape_env.create_symintnode(formula, hint=size.node.hint)


def fix(number: Any) -> None:
    """Guard a number to be its captured value: for another value, the graph is compiled anew."""
    kinds = {torch.SymFloat: float, torch.SymBool: bool}
    kinds.get(type(number), int)(number)


def seen(number: torch.SymFloat) -> float | None:
    """Return the value of a float when the graph was captured, None where it depends on the data; add no guard."""
    return float(number.node.hint) if number.node.has_hint() else None


def unguarded() -> AbstractContextManager[None]:
    """Return a context in which captured values answer this thread's questions about sizes, without guards."""
    return ShapeEnv().suppress_guards()


@contextmanager
def without_guards(sizes: Iterable[Any]) -> Iterator[None]:
    """Check that nothing in this context adds a guard on sizes.

    Raises:
        AssertionError: a guard was added.
    """
    shape_env = next((size.node.shape_env for size in sizes if isinstance(size, torch.SymInt)), None)
    before = len(shape_env.guards) if shape_env is not None else 0
    yield
    added = [str(guard.expr) for guard in shape_env.guards[before:]] if shape_env is not None else []
    assert not added, f"guards were added: {', '.join(added)}"


def any_length(shape_env: ShapeEnv) -> int:
    """Return a symbol for the length of a chunk, about which only one fact is assumed: it is 2 or more.

    Code compiled for it is right for 1, too: the symbol has no value that torch could specialise on.
    """
    with shape_env.ignore_fresh_unbacked_symbols():
        length: Any = shape_env.create_unbacked_symint()
    torch._check(length >= 2)
    return length
