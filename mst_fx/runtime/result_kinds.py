"""Kinds of results: how outputs of a body become a result of a loop. Graphs and generated code hold their literals.

Legend: n positions of a chunk, i and j columns, g groups of rows.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
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
        """The name of the kind, then the values of its fields."""
        return (self.name, *(getattr(self, field.name) for field in fields(self)))

    @property
    def outputs(self) -> int:
        """The number of the body's outputs that make one result."""
        return 1


@dataclass(frozen=True)
class Cat(_Kind):
    """The loop writes the output to its place in the result."""

    name = "cat"
    dim: int
    outer: int
    inner: int

    @property
    def axis(self) -> Axis:
        """(dim, outer, inner) of the result."""
        return self.dim, self.outer, self.inner

    def shape(self, chunk: tuple[int, ...], total: int) -> list[int]:
        """Return the shape of the result.

        Args:
            chunk: shape of an output.
            total: length of the axis in positions.
        """
        sizes = list(chunk)
        sizes[self.dim] = self.outer * total * self.inner
        return sizes


@dataclass(frozen=True)
class Rows(_Kind):
    """The loop writes the sum of `count` products A [n, k] times B [k, j] to its place in the result.

    Attributes:
        count: number of products.
        axis: (dim, outer, inner) of the result.
        sizes: shape of the result, 0 for the dim of the axis.
    """

    name = "rows"
    count: int
    axis: Axis
    sizes: tuple[int, ...]

    @property
    def outputs(self) -> int:
        """Two for each product."""
        return 2 * self.count

    def shape(self, total: int) -> list[int]:
        """Return the shape of the result for an axis of `total` positions."""
        dim, _, inner = self.axis
        return [total * inner if position == dim else size for position, size in enumerate(self.sizes)]


@dataclass(frozen=True)
class Sum(_Kind):
    """The output adds up over the chunks in `dtype`; the result has dtype `result`."""

    name = "sum"
    dtype: torch.dtype
    result: torch.dtype

    def adds_up_in(self, *, several: bool) -> torch.dtype:
        """Return the dtype of the sum; one chunk alone adds nothing up and needs no other dtype than the result's."""
        return self.dtype if several else self.result

    def shape(self, outputs: Sequence[Sequence[int]]) -> list[int]:
        """Return the shape of the result, from those of the outputs that make it."""
        return list(outputs[0])


@dataclass(frozen=True)
class Outer(Sum):
    """The product A^T B [i, j] of two outputs A [n, i] and B [n, j], or of a batch of such, adds up over the chunks."""

    name = "outer"

    @property
    def outputs(self) -> int:
        """A and B."""
        return 2

    def shape(self, outputs: Sequence[Sequence[int]]) -> list[int]:
        """Return [i, j], behind the dims of a batch."""
        a, b = outputs
        return [*a[:-2], a[-1], b[-1]]


@dataclass(frozen=True)
class Grouped(Outer):
    """The same for each group of rows of A and B: [g, i, j] adds up; a third output [g] says where each group ends."""

    name = "grouped"

    @property
    def outputs(self) -> int:
        """A, B and the ends of the groups."""
        return 3

    def shape(self, outputs: Sequence[Sequence[int]]) -> list[int]:
        """Return [g, i, j]."""
        a, b, ends = outputs
        return [ends[0], a[1], b[1]]


ResultKind: TypeAlias = Cat | Rows | Sum
_KINDS: dict[str, type[Any]] = {kind.name: kind for kind in (Cat, Rows, Sum, Outer, Grouped)}


@functools.cache
def kind_of(literal: tuple[Any, ...]) -> ResultKind:
    """Return the kind that a literal stands for."""
    name, *values = literal
    return _KINDS[name](*values)
