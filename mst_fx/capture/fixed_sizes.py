"""Sizes that a loop needs fixed, or equal. The analysis takes them as such; they become guards where the loop is put.

Each guard makes another value compile anew, so a region that is left alone must add none.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch.fx import Node
from torch.utils._pytree import tree_map

from mst_fx.core.refusal import Reason, Refusal
from mst_fx.core.sizes import (
    VARYING,
    alone,
    depends_on_data,
    expression,
    fix,
    hint,
    in_terms_of,
    is_symbolic,
    seen_symbols,
    unguarded,
)


@dataclass(frozen=True)
class Equal:
    """Two sizes that vary, and that a loop needs equal.

    Attributes:
        size, other: SymInts, or one of them a number; they were equal when the graph was captured.
        symbol, value: one of their symbols and what it is if they are equal, both sympy expressions.
    """

    size: Any
    other: Any
    symbol: Any
    value: Any

    def __str__(self) -> str:
        return f"{self.size} == {self.other}"


def equal(size: Any, other: Any, marked: Container[str]) -> tuple[Any, ...]:
    """Return what to fix, and what to take as equal, so that two sizes are equal; nothing where nothing makes them so.

    The equation is solved for one symbol. In a product of symbols, the rows of a batch, the symbol with the smaller
    value is taken for the batch and fixed.

    Args:
        size: one of the two.
        other: the other one.
        marked: names of the sizes that must vary: no fact may fix them.
    """
    facts = _equal(size, other)
    return () if any(symbol in marked for fact in facts for symbol in _fixed_by(fact)) else facts


def _equal(size: Any, other: Any) -> tuple[Any, ...]:
    formulas = [expression(size), expression(other)]
    found = _solved(*formulas)
    if found is not None:
        return (Equal(size, other, *found),)
    varying = [x for x in (size, other) if is_symbolic(x)]
    seen = {symbol: value for x in varying for symbol, value in seen_symbols(x).items()}
    for symbol in sorted(seen, key=lambda symbol: (seen[symbol], str(symbol))):
        batch = {symbol: sympy.sympify(seen[symbol])}
        found = _solved(*(formula.xreplace(batch) for formula in formulas))
        if found is not None:
            holder = next(x for x in varying if symbol in expression(x).free_symbols)
            return (alone(symbol, holder), Equal(size, other, *found))
    return ()


def _solved(formula: Any, other: Any) -> tuple[Any, Any] | None:
    """Solve the equation of two formulas for a symbol, by additions and exact divisions; None where that fails."""
    difference = sympy.expand(formula - other)
    for symbol in (*formula.free_symbols, *other.free_symbols):
        factor = difference.coeff(symbol)
        value = sympy.expand(symbol - difference / factor) if factor.is_Integer and factor else symbol
        whole = all(number.is_Integer for number in value.atoms(sympy.Rational))
        if whole and symbol not in value.free_symbols:
            return symbol, value
    return None


def _fixed_by(fact: Any) -> list[str]:
    """Return the names of the symbols that a fact (a fixed size, or `Equal`) makes numbers."""
    if isinstance(fact, Equal):
        return [] if fact.value.free_symbols else [str(fact.symbol)]
    return [str(symbol) for symbol in seen_symbols(fact)]


def fix_all(sizes: Sequence[Any]) -> None:
    """Guard on sizes: they are what they were when captured, or equal; other sizes compile anew."""
    for size in sizes:
        if isinstance(size, Equal):
            bool(size.size == size.other)
        else:
            fix(size)


def other_dims(stream: torch.Tensor, marked: Container[str]) -> tuple[Any, ...]:
    """Return the sizes of a stream to fix: only its longest dim may vary, others (the batch) must not.

    Args:
        stream: the captured value.
        marked: names of the sizes that have to vary.
    """
    varying = sorted((size for size in stream.shape[:-1] if is_symbolic(size)), key=hint)
    return tuple(size for size in varying[:-1] if not depends_on_data(size) and str(size) not in marked)


def to_be_fixed(read: Sequence[tuple[Node, Node]], stream: torch.Tensor, marked: Container[str]) -> tuple[Any, ...]:
    """Return the numbers that ops of a loop read, to be fixed.

    Args:
        read: pairs of an op and a number that it reads.
        stream: the captured value: its length must not be fixed.
        marked: names of the sizes that have to vary.

    Raises:
        Refusal: a number must not be fixed, or cannot be.
    """
    for node, number in read:
        forbid_lengths(node, number.meta["val"], stream, marked)
    return tuple(number.meta["val"] for _, number in read)


def forbid_lengths(node: Node, number: Any, stream: torch.Tensor, marked: Container[str]) -> None:
    """Raise a refusal for a number that depends on the data, or on a length that must vary.

    Args:
        node: the op that takes the number.
        number: the SymInt or SymFloat to fix.
        stream: the captured value, whose lengths must stay symbols.
        marked: names of the sizes that have to vary.

    Raises:
        Refusal: the number depends on the data or on such a length (NUMBER).
    """
    if depends_on_data(number):
        raise Refusal(Reason.NUMBER, node, f"{node.target} takes a number that depends on the data")
    symbols = expression(number).free_symbols
    sizes: list[Any] = [size for size in stream.shape if is_symbolic(size)]
    lengths = {symbol for size in sizes for symbol in expression(size).free_symbols}
    if not symbols.isdisjoint(lengths) or any(str(symbol) in marked for symbol in symbols):
        raise Refusal(Reason.NUMBER, node, f"{node.target} takes a number that varies with the length")


def as_if_fixed(values: Sequence[Any], sizes: Sequence[Any]) -> list[Any]:
    """Return captured values as they would be if these sizes were fixed; this adds no guard.

    Args:
        values: fake tensors, sizes, and other values, which stay as they are.
        sizes: the sizes to fix, and `Equal`s; none depends on the data.
    """
    seen = known_of(sizes)
    return [tree_map(lambda leaf: _with(leaf, seen), value) if seen else value for value in values]


def known_of(sizes: Sequence[Any], known: Mapping[Any, Any] | None = None) -> dict[Any, Any]:
    """Return the value of each symbol that fixed or equal sizes give, as sympy expressions.

    Args:
        sizes: fixed sizes and `Equal`s; a later one may depend on symbols that an earlier one leaves open.
        known: other known values of symbols.
    """
    seen = {symbol: sympy.sympify(value) for symbol, value in (known or {}).items()}
    for size in sizes:
        more = {size.symbol: size.value} if isinstance(size, Equal) else seen_symbols(size)
        more = {symbol: sympy.sympify(value).xreplace(seen) for symbol, value in more.items()}
        seen = {symbol: value.xreplace(more) for symbol, value in seen.items()} | more
    return seen


def _with(value: Any, seen: Mapping[Any, Any]) -> Any:
    if isinstance(value, VARYING):
        return in_terms_of(value, seen)
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
        return value
    before = (*value.shape, *value.stride())
    after = [in_terms_of(size, seen) for size in before]
    if all(a is b for a, b in zip(before, after, strict=True)):
        return value
    mode: Any = value.fake_mode  # type: ignore[attr-defined]
    shape, stride = after[: value.dim()], after[value.dim() :]
    with mode, torch.no_grad(), unguarded():
        fixed = torch.empty_strided(shape, stride, dtype=value.dtype, device=value.device)
    return fixed.requires_grad_(value.requires_grad)
