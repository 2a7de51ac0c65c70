"""How the outputs of a body become the results of a loop; each kind has literals, which graphs and generated code hold.

Legend: n positions of a mini-sequence, i and j columns.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar, TypeAlias

import torch

Axis: TypeAlias = tuple[int, int, int]
"""(dim, outer, inner), as in `placement.Split`."""


@dataclass(frozen=True)
class _Kind:
    name: ClassVar[str]

    @property
    def literal(self) -> tuple[Any, ...]:
        """The name of the kind, then its fields."""
        return (self.name, *(getattr(self, field.name) for field in fields(self)))

    @property
    def outputs(self) -> int:
        """How many outputs of the body make one result."""
        return 1


@dataclass(frozen=True)
class Cat(_Kind):
    """The output is written to its place in the result."""

    name = "cat"
    dim: int
    outer: int
    inner: int

    def shape(self, piece: tuple[int, ...], total: int) -> list[int]:
        """Sizes of the result.

        Args:
            piece: those of an output.
            total: positions of the axis.
        """
        sizes = list(piece)
        sizes[self.dim] = self.outer * total * self.inner
        return sizes


@dataclass(frozen=True)
class Rows(_Kind):
    """`count` pairs A [n, k] and B [k, j]; the sum of the products A B is written to its place in the result.

    Attributes:
        count: of pairs.
        axis: of the result.
        sizes: of the result, 0 for the dim of the axis.
    """

    name = "rows"
    count: int
    axis: Axis
    sizes: tuple[int, ...]

    @property
    def outputs(self) -> int:
        """Two a pair."""
        return 2 * self.count

    def shape(self, total: int) -> list[int]:
        """Sizes of the result for `total` positions of the axis."""
        dim, _, inner = self.axis
        return [total * inner if position == dim else size for position, size in enumerate(self.sizes)]


@dataclass(frozen=True)
class Sum(_Kind):
    """The output adds up over the mini-sequences in `dtype`; the result has dtype `result`."""

    name = "sum"
    dtype: torch.dtype
    result: torch.dtype

    def adds_up_in(self, *, several: bool) -> torch.dtype:
        """One mini-sequence adds nothing up: it needs no other dtype."""
        return self.dtype if several else self.result


@dataclass(frozen=True)
class Outer(Sum):
    """Two outputs A [n, i] and B [n, j]; the product A^T B [i, j] adds up."""

    name = "outer"

    @property
    def outputs(self) -> int:
        """A and B."""
        return 2


ResultKind: TypeAlias = Cat | Rows | Sum
_KINDS: dict[str, type[Any]] = {kind.name: kind for kind in (Cat, Rows, Sum, Outer)}


def kind_of(literal: tuple[Any, ...]) -> ResultKind:
    """The kind that a literal stands for."""
    name, *values = literal
    return _KINDS[name](*values)
