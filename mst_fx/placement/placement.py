"""How a value of a region lies across the mini-sequences: split along a dim, a partial sum, whole, or sorted by each.

Split / Partial / Whole are DTensor's Shard / Partial / Replicate, in time instead of space; Routed has no counterpart.

Terms
  axis    the one factor that is cut into mini-sequences, of length L; usually the tokens of one sequence
  outer   the factors that a view merged in front of the axis: a dim of size outer * L * inner
  inner   the factors that a view merged behind it
  sure    true whatever the sizes are that are only known at run time; asking adds no guard
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal, TypeAlias

from torch.fx import Node

from mst_fx.core.sizes import hint, number, sure


def same_shape(a: Sequence[int], b: Sequence[int]) -> bool:
    """Whether two shapes are surely equal."""
    return len(a) == len(b) and all(sure(x == y) for x, y in zip(a, b, strict=True))


@dataclass(frozen=True)
class Split:
    """Dim `dim` of size outer * L * inner is cut along L."""

    dim: int
    outer: int = 1
    inner: int = 1

    def axis_length(self, shape: Sequence[int]) -> int:
        """L, for a value of this shape."""
        return shape[self.dim] // (self.outer * self.inner)

    def moved(self, dim: int) -> Split:
        """The same axis in another dim of the same make-up."""
        return Split(dim, self.outer, self.inner)

    def chunk_shape(self, shape: Sequence[int], length: int) -> list[int]:
        """The shape of a mini-sequence with `length` positions of the axis."""
        chunk = list(shape)
        chunk[self.dim] = self.outer * length * self.inner
        return chunk


@dataclass(frozen=True)
class Whole:
    """Every mini-sequence sees all of it (a weight, a scale)."""


@dataclass(frozen=True)
class Partial:
    """The value is the sum of what the mini-sequences compute."""


@dataclass(frozen=True)
class Routed:
    """A value of one mini-sequence that is no part of the whole's: its rows were sorted (see `rules.routing`).

    Attributes:
        kind: "rows" in sorted order; the "order" that sorts; its "inverse"; "counts" of the keys and the ends of their
            "groups"; "opaque" for memory without a meaning.
        key: the node whose values were sorted.
        split: how the rows would lie, unsorted.
        per: how many sorted rows come from one row that an order names.
        by: the sort; another one of the same key may put rows of equal keys in another order.
    """

    kind: Literal["rows", "order", "inverse", "counts", "groups", "opaque"]
    key: Node
    split: Split
    per: int = 1
    by: Node | None = None


Placement: TypeAlias = Split | Whole | Partial | Routed
WHOLE = Whole()
PARTIAL = Partial()


def adds_up(placement: object) -> bool:
    """Whether what the mini-sequences compute, added up, is the value of the whole."""
    return placement == PARTIAL or (isinstance(placement, Routed) and placement.kind in ("counts", "groups"))


def split_of(placement: object) -> Split | None:
    """How a mini-sequence's share of a value is shaped, None where it has the shape of the whole."""
    if isinstance(placement, Routed) and placement.kind not in ("counts", "groups"):
        return placement.split
    return placement if isinstance(placement, Split) else None


def through_view(split: Split, before: Sequence[int], after: Sequence[int]) -> Split | None:
    """Where the axis lies after `before`-shaped memory is read as `after`; None where no single dim holds it."""
    if _is_empty(before):
        return None
    axis = split.axis_length(before)
    in_front = prod(before[: split.dim]) * split.outer
    behind = split.inner * prod(before[split.dim + 1 :])
    for dim, size in enumerate(after):
        front, back = prod(after[:dim]), prod(after[dim + 1 :])
        fits = sure(in_front % front == 0) and sure(behind % back == 0)
        outer, inner = number(in_front // front), number(behind // back)
        if fits and outer and inner and sure(size == outer * axis * inner):
            return Split(dim, outer, inner)
    return None


def _is_empty(shape: Sequence[int]) -> bool:
    """Whether a shape held nothing when it was captured: any factors would do, and none can be divided by."""
    return any(hint(size) == 0 for size in shape)


def _refines(part: Split, split: Split) -> bool:
    return sure(part.outer % split.outer == 0) and sure(part.inner % split.inner == 0)


def refinements(split: Split, before: Sequence[int], after: Sequence[int]) -> list[Split]:
    """The parts of an axis that a view spreads over several dims, as splits of the value before the view."""
    if _is_empty(before):
        return []
    in_front = prod(before[: split.dim])
    behind = prod(before[split.dim + 1 :])
    parts = []
    for dim, size in enumerate(after):
        front, back = prod(after[:dim]), prod(after[dim + 1 :])
        if not sure(size <= 1) and sure(front % in_front == 0) and sure(back % behind == 0):
            outer, inner = number(front // in_front), number(back // behind)
            if outer is None or inner is None:
                continue
            part = Split(split.dim, outer, inner)
            if sure(part.outer * size * part.inner == before[split.dim]) and _refines(part, split):
                parts.append(part)
    return parts
