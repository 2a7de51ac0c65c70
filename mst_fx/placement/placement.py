"""How a value of a region lies across the chunks: split along a dim, a partial sum, whole, or sorted in each chunk.

Split / Partial / Whole are DTensor's Shard / Partial / Replicate, in time instead of space; Routed has no counterpart.

Terms
  axis    the one factor that is split into chunks, of length L; usually the tokens of one sequence
  outer   the factors that a view merged in front of the axis: a dim of size outer * L * inner
  inner   the factors that a view merged after it
  sure    true for all values of the sizes that are only known at run time; asking adds no guard
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal, TypeAlias

from torch.fx import Node

from mst_fx.core.sizes import hint, number, sure


def same_shape(a: Sequence[int], b: Sequence[int]) -> bool:
    """Return whether two shapes are equal for all values of their sizes."""
    return len(a) == len(b) and all(sure(x == y) for x, y in zip(a, b, strict=True))


@dataclass(frozen=True)
class Split:
    """Dim `dim` of size outer * L * inner is split along L."""

    dim: int
    outer: int = 1
    inner: int = 1

    def axis_length(self, shape: Sequence[int]) -> int:
        """Return L, in positions, for a value of this shape."""
        return shape[self.dim] // (self.outer * self.inner)

    def moved(self, dim: int) -> Split:
        """Return the same axis in another dim, with the same outer and inner factors."""
        return Split(dim, self.outer, self.inner)

    def chunk_shape(self, shape: Sequence[int], length: int) -> list[int]:
        """Return the shape of a chunk with `length` positions of the axis."""
        chunk = list(shape)
        chunk[self.dim] = self.outer * length * self.inner
        return chunk


@dataclass(frozen=True)
class Whole:
    """Every chunk reads all of it (a weight, a scale)."""


@dataclass(frozen=True)
class Partial:
    """The value is the sum of what the chunks compute."""


@dataclass(frozen=True)
class Routed:
    """A value of each chunk that is no slice of a whole value: the chunk sorts its own rows (see `rules.routing`).

    Attributes:
        kind: "rows" that are sorted; the "permutation" that sorts them and its "inverse"; "counts" of the keys and the
            ends of their "groups"; "opaque" for memory whose values have no meaning.
        key: the node whose values are sorted.
        split: how the rows would lie if they were not sorted.
        per: how many sorted rows come from one row that the permutation names.
        by: the node that sorts; another sort of the same key may permute rows of equal keys in another way.
    """

    kind: Literal["rows", "permutation", "inverse", "counts", "groups", "opaque"]
    key: Node
    split: Split
    per: int = 1
    by: Node | None = None


Placement: TypeAlias = Split | Whole | Partial | Routed
WHOLE = Whole()
PARTIAL = Partial()


def adds_up(placement: object) -> bool:
    """Return whether what the chunks compute, added up, is the whole value."""
    return placement == PARTIAL or (isinstance(placement, Routed) and placement.kind in ("counts", "groups"))


def split_of(placement: object) -> Split | None:
    """Return the split that gives a value its shape in one chunk; None where it has the shape of the whole value."""
    if isinstance(placement, Routed) and placement.kind not in ("counts", "groups"):
        return placement.split
    return placement if isinstance(placement, Split) else None


def through_view(split: Split, before: Sequence[int], after: Sequence[int]) -> Split | None:
    """Return where the axis lies if memory of shape `before` is read as `after`; None where no single dim holds it."""
    if _is_empty(before):
        return None
    axis = split.axis_length(before)
    in_front = prod(before[: split.dim]) * split.outer
    behind = split.inner * prod(before[split.dim + 1 :])
    for dim, size in enumerate(after):
        front, back = prod(after[:dim]), prod(after[dim + 1 :])
        if sure(in_front % front == 0) and sure(behind % back == 0):
            outer, inner = number(in_front // front), number(behind // back)
            if outer and inner and sure(size == outer * axis * inner):
                return Split(dim, outer, inner)
    return None


def _is_empty(shape: Sequence[int]) -> bool:
    """Return whether a shape had no element when it was captured: any factors fit, and no size can be divided by."""
    return any(hint(size) == 0 for size in shape)


def _refines(candidate: Split, split: Split) -> bool:
    return sure(candidate.outer % split.outer == 0) and sure(candidate.inner % split.inner == 0)


def refinements(split: Split, before: Sequence[int], after: Sequence[int]) -> list[Split]:
    """Return the splits, by one factor of the axis each, of a value whose axis a view spreads over several dims."""
    if _is_empty(before):
        return []
    in_front = prod(before[: split.dim])
    behind = prod(before[split.dim + 1 :])
    finer = []
    for dim, size in enumerate(after):
        front, back = prod(after[:dim]), prod(after[dim + 1 :])
        if not sure(size <= 1) and sure(front % in_front == 0) and sure(back % behind == 0):
            outer, inner = number(front // in_front), number(back // behind)
            if outer is None or inner is None:
                continue
            candidate = Split(split.dim, outer, inner)
            if sure(candidate.outer * size * candidate.inner == before[split.dim]) and _refines(candidate, split):
                finer.append(candidate)
    return list(dict.fromkeys([*finer, *_merged(split, before, after)]))


def _merged(split: Split, before: Sequence[int], after: Sequence[int]) -> list[Split]:
    """Return the same where the view also merges a factor of the axis with a dim beside it: heads with the batch."""
    if not all(isinstance(size, int) for size in (*before, *after)):
        return []
    low = prod(before[split.dim + 1 :])
    high, finer = low * before[split.dim], []
    for dim, size in enumerate(after):
        back = prod(after[dim + 1 :])
        start, end = max(low, back), min(high, back * size)
        divides = not (start % low or start % back or end % start or high % end or back * size % end)
        if divides and end > start:
            finer.append(Split(split.dim, high // end, start // low))
    return [candidate for candidate in finer if _refines(candidate, split)]
