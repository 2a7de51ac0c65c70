"""Sizes that are known, and those that are only known at run time; asking adds no guard."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, TypeAlias

import sympy  # type: ignore[import-untyped]
import torch

from mst_fx.core.torch_private import symbols
from mst_fx.core.torch_private.symbols import ShapeEnv, is_concrete_int, statically_known_true

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
    value = symbols.captured_value(size)
    return UNSEEN if value is None else int(value)


def long_hint(size: Any) -> int:
    """Return the same with LONG, or the largest value if that is smaller, for each symbol with a smaller hint."""
    if not isinstance(size, torch.SymInt) or symbols.captured_value(size) is None:
        return hint(size)
    seen = seen_symbols(size).items()
    long = {symbol: max(value, min(LONG, symbols.largest_value(symbol, size))) for symbol, value in seen}
    return int(symbols.formula_of(size).xreplace(long))


def depends_on_data(size: Any) -> bool:
    """Return whether a size, or another number, had no value when the graph was captured."""
    return isinstance(size, VARYING) and symbols.captured_value(size) is None


def is_size(value: Any) -> bool:
    """Return whether a value of a traced graph is a size or a list of sizes, not a tensor."""
    if isinstance(value, tuple | list):
        return all(map(is_size, value))
    return isinstance(value, (int, float, *VARYING))


def is_symbolic(size: Any) -> bool:
    """Return whether a size is only known at run time."""
    return isinstance(size, torch.SymInt) and not symbols.is_fixed(size)


def number(size: Any) -> int | None:
    """Return a size as a number, where all symbols in it cancel; None where they do not."""
    return int(size) if is_concrete_int(size) else None


def expression(size: Any) -> Any:
    """Return the sympy formula of a size, or of another number that varies."""
    return symbols.formula_of(size) if isinstance(size, VARYING) else sympy.sympify(size)


def seen_symbols(size: Any) -> dict[Any, Any]:
    """Return the symbols of a size, and the values that they had when the graph was captured."""
    free = expression(size).free_symbols
    known = symbols.captured_symbols(size) if free else {}
    return {symbol: known[symbol] for symbol in free}


def alone(symbol: Any, holder: Any) -> Any:
    """Return a symbol of the size `holder` as a size of its own."""
    return symbols.size_of(symbol, int(seen_symbols(holder)[symbol]), holder)


def in_terms_of(size: Any, known: Mapping[Any, Any]) -> Any:
    """Return a size, or another number, with formulas of `known` in place of symbols: a number where none is left."""
    if not isinstance(size, VARYING) or expression(size).free_symbols.isdisjoint(known):
        return size
    formula, value = expression(size).xreplace(known), symbols.captured_value(size)
    if not isinstance(size, torch.SymInt):
        return size if formula.free_symbols else type(value)(formula)
    return int(formula) if formula.is_number else symbols.size_of(formula, value, size)


def known_sizes(captured: Iterable[Any], actual: Iterable[Any]) -> dict[Any, Any]:
    """Return the values of the symbols of captured sizes that follow from actual ones.

    A multiple of a symbol tells it, too, if the other factors are numbers or symbols that are known by then.
    """
    found: dict[Any, Any] = {}
    pairs = [(expression(size), value) for size, value in zip(captured, actual, strict=True) if is_symbolic(size)]
    for formula, value in sorted(pairs, key=lambda pair: len(pair[0].free_symbols)):
        unknown = formula.free_symbols.difference(found)
        if len(unknown) == 1:
            (symbol,) = unknown
            factor = formula / symbol
            if symbol not in factor.free_symbols:
                found[symbol] = value if factor == 1 else value // symbols.computed(factor, found)
    return found


def at_sizes(size: Any, values: Mapping[Any, Any]) -> Any:
    """Return a captured size where symbols have these values."""
    return symbols.computed(expression(size), values) if values and is_symbolic(size) else size


def fix(number: Any) -> None:
    """Guard a number to be its captured value: for another value, the graph is compiled anew."""
    kinds = {torch.SymFloat: float, torch.SymBool: bool}
    kinds.get(type(number), int)(number)


def seen(number: torch.SymFloat) -> float | None:
    """Return the value of a float when the graph was captured, None where it depends on the data; add no guard."""
    value = symbols.captured_value(number)
    return None if value is None else float(value)


def unguarded() -> AbstractContextManager[None]:
    """Return a context in which captured values answer this thread's questions about sizes, without guards."""
    return ShapeEnv().suppress_guards()


@contextmanager
def without_guards(sizes: Iterable[Any]) -> Iterator[None]:
    """Check that nothing in this context adds a guard on sizes.

    Raises:
        AssertionError: a guard was added.
    """
    size = next((size for size in sizes if isinstance(size, torch.SymInt)), None)
    before = 0 if size is None else len(symbols.guards_of(size))
    yield
    added = [] if size is None else list(map(str, symbols.guards_of(size)[before:]))
    assert not added, f"guards were added: {', '.join(added)}"


def any_length(shape_env: ShapeEnv) -> int:
    """Return a symbol for the length of a chunk, about which only one fact is assumed: it is 2 or more.

    Code compiled for it is right for 1, too: the symbol has no value that torch could specialise on.
    """
    length = symbols.size_without_value(shape_env)
    torch._check(length >= 2)
    return length
