"""Policy: how long a chunk is. The user says so; otherwise it is long enough for fast matrix products."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from mst_fx.core.config import Accumulate, Wish
from mst_fx.plan.head_groups import default_group, larger_group, smaller_group
from mst_fx.predict.extent import Extent

CHUNK_BYTES = 2**28
"""Target bytes of the widest matrix product of a chunk."""
MIN_ROWS, MAX_ROWS = 1024, 4096
"""Bounds of the rows that multiply one matrix in a chunk: one for each token, fewer where experts share the tokens.

Below, matmuls lose speed; above, the only gain is fewer reads and writes of the sums (SwiGLU of 8B, H100)."""
TILE = 128
"""Rows are a multiple of it, as matmuls compute in tiles of so many."""
LEAST_ROWS = 128
"""No budget gives a chunk fewer rows: products would lose more than half of their speed."""
FORWARD_FACTOR = 2
"""A forward chunk needs a third of the memory of its gradients, so a recomputing region takes longer ones forward."""
ALIGNMENT = 16
"""Chunk lengths are a multiple of it where there is a choice, so that every chunk starts aligned."""
NEAR = 1.15
"""A chunk may be longer or shorter by this factor if none is ragged then: that saves a body, and fills the matmuls."""


@dataclass(frozen=True)
class Lengths:
    """Positions of one chunk.

    Attributes:
        chunk: in the loop that computes gradients, if there is one.
        forward: in the loop that computes only results.
    """

    chunk: int
    forward: int


@dataclass(frozen=True)
class Terms:
    """What the chunk lengths of one region are chosen by, and the default.

    Attributes:
        extent: numbers of its axis.
        wish: the user's wish for the region.
        lengths: the default.
    """

    extent: Extent
    wish: Wish
    lengths: Lengths


def terms_of(extent: Extent, wish: Wish, accumulate: Accumulate, *, recomputes: bool) -> Terms:
    """Return the default lengths and what they depend on; for the arguments see `default_lengths`."""
    return Terms(extent, wish, default_lengths(extent, wish, accumulate, recomputes=recomputes))


def default_lengths(extent: Extent, wish: Wish, accumulate: Accumulate, *, recomputes: bool) -> Lengths:
    """Return the lengths that the user fixes; otherwise even chunks of about CHUNK_BYTES in the widest product.

    Args:
        extent: numbers of the region's axis.
        wish: the user's wish for this region.
        accumulate: dtype of the sums, which every chunk reads and writes once.
        recomputes: whether the forward has a loop of its own, whose chunks can be longer.
    """
    if extent.over == "heads":
        return _alike(default_group(extent, wish))
    if wish.num_chunks is not None:
        length = max(1, -(-extent.length // wish.num_chunks))
        return Lengths(length, length)
    if wish.chunk_tokens is not None:
        length = _bounded(extent, max(1, wish.chunk_tokens // extent.tokens_per_position))
        return Lengths(length, length)
    length = _even(extent, max(1, _rows(extent, accumulate) // extent.tokens_per_position))
    return Lengths(length, _bounded(extent, FORWARD_FACTOR * length) if recomputes else length)


def _rows(extent: Extent, accumulate: Accumulate) -> int:
    """Return the tokens of a chunk.

    A float32 sum doubles the traffic, and its final cast takes memory that the chunks can use before. Shorter chunks
    would cost time and save nothing.
    """
    aim = CHUNK_BYTES * extent.tokens_per_position // max(1, extent.widest)
    rows = int(min(MAX_ROWS * extent.sharing, max(MIN_ROWS * extent.sharing, aim)))
    if accumulate == "float32" and extent.wide:
        rows = max(rows, extent.cast * extent.tokens_per_position // extent.wide)
    return max(rows - rows % TILE, min(rows, TILE))


def shorter(terms: Terms, lengths: Lengths) -> Lengths | None:
    """Return half the length; None where the user fixes the length, or where products would have too few rows."""
    extent = terms.extent
    if extent.over == "heads":
        group = None if terms.wish.fixes_length else smaller_group(extent, lengths.chunk)
        return None if group is None else _alike(group)
    half = _even(extent, -(-lengths.chunk // 2))
    tokens = half * extent.tokens_per_position
    if terms.wish.fixes_length or half >= lengths.chunk or tokens < LEAST_ROWS * extent.sharing:
        return None
    return Lengths(half, half)


def several(terms: Terms, *, demanded: bool) -> Lengths:
    """Return the default length, or a shorter one where it is as long as the whole axis: one chunk saves little.

    Where the length varies, a short sequence is one chunk on purpose: it costs no more than without a loop.

    Args:
        terms: of the region.
        demanded: whether the user wants a loop in any case, even if products get few rows.
    """
    lengths, length = terms.lengths, terms.extent.length
    if terms.extent.dynamic or terms.wish.fixes_length:
        return lengths
    while lengths.chunk >= length and (half := shorter(terms, lengths)):
        lengths = half
    few = -(-length // 2)
    if terms.extent.over == "heads":
        few = smaller_group(terms.extent, length, demanded=True) or length
    return Lengths(few, few) if demanded and lengths.chunk >= length else lengths


def in_chunks(terms: Terms, count: int) -> Lengths:
    """Return the length of so many chunks; the default where the user fixes it, or where products get too few rows."""
    lengths, extent = terms.lengths, terms.extent
    length = _even(extent, -(-extent.length // count))
    if terms.wish.fixes_length or length * extent.tokens_per_position < LEAST_ROWS * extent.sharing:
        return lengths
    return Lengths(length, length)


def longer(terms: Terms, lengths: Lengths) -> Lengths | None:
    """Return about twice the length; None where the user fixes it, or a chunk would be the only or a ragged one."""
    extent = terms.extent
    if extent.over == "heads":
        group = None if terms.wish.fixes_length else larger_group(extent, lengths.chunk)
        return None if group is None else _alike(group)
    double = _even(extent, 2 * lengths.chunk)
    ragged = extent.length % double > 0 and extent.length % lengths.chunk == 0
    if terms.wish.fixes_length or double >= extent.length or (ragged and not extent.dynamic):
        return None
    return Lengths(double, max(double, lengths.forward))


def _alike(length: int) -> Lengths:
    return Lengths(length, length)


def _even(extent: Extent, length: int) -> int:
    """Return about this length, so that chunks are equally long; if a near length leaves none ragged, return that."""
    if extent.dynamic:
        return length
    fewest, most = (max(1, ceil(extent.length / (length * near))) for near in (NEAR, 1 / NEAR))
    whole = (count for count in range(fewest, most + 1) if extent.length % (count * ALIGNMENT) == 0)
    even = -(-extent.length // next(whole, ceil(extent.length / length)))
    return _bounded(extent, -(-even // ALIGNMENT) * ALIGNMENT)


def _bounded(extent: Extent, length: int) -> int:
    return length if extent.dynamic else min(extent.length, length)
