"""How long a mini-sequence is: as the user says, else long enough for its matrix products to be fast. Policy."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from mst_fx.core.config import Accumulate, Wish
from mst_fx.predict.extent import Extent

CHUNK_BYTES = 2**28
"""Aim for the widest matrix product of a chunk (bytes)."""
MIN_ROWS, MAX_ROWS = 1024, 4096
"""Rows that a matrix meets in a chunk: one a token, fewer where tokens are shared out among experts.

Below, matmuls lose speed; above, only the sums are read and written less often (SwiGLU of 8B, H100)."""
TILE = 128
"""Rows are multiples of it, as matmuls compute them."""
LEAST_ROWS = 128
"""No budget makes chunks shorter: products would lose more than half of their speed."""
FORWARD_FACTOR = 2
"""A forward chunk needs a third of the memory that its gradients need, so a recomputing region's may be longer."""
ALIGNMENT = 16
"""Chunk lengths are multiples of it where there is a choice, so that every chunk starts aligned."""
NEAR = 1.15
"""So much longer or shorter may a chunk be if none is ragged then: that is one body less, and full matmuls."""


@dataclass(frozen=True)
class Lengths:
    """Positions of one mini-sequence.

    Attributes:
        chunk: in the loop that computes gradients, if any.
        forward: in the loop that computes results only.
    """

    chunk: int
    forward: int


@dataclass(frozen=True)
class Terms:
    """What the lengths of one region's mini-sequences are chosen by, and what they are by default.

    Attributes:
        extent: of its axis.
        wish: the user's.
        lengths: by default.
    """

    extent: Extent
    wish: Wish
    lengths: Lengths


def terms_of(extent: Extent, wish: Wish, accumulate: Accumulate, *, recomputes: bool) -> Terms:
    """The default and what it depends on; arguments as of `default_lengths`."""
    return Terms(extent, wish, default_lengths(extent, wish, accumulate, recomputes=recomputes))


def default_lengths(extent: Extent, wish: Wish, accumulate: Accumulate, *, recomputes: bool) -> Lengths:
    """As the user says, else about CHUNK_BYTES in the widest product; the chunks are even.

    Args:
        extent: of the region's axis.
        wish: the user's, for this region.
        accumulate: dtype policy of the sums, which are read and written once a chunk.
        recomputes: whether the forward has a loop of its own, whose chunks may be longer.
    """
    if wish.num_chunks is not None:
        chunk = max(1, -(-extent.length // wish.num_chunks))
        return Lengths(chunk, chunk)
    if wish.chunk_tokens is not None:
        chunk = _bounded(extent, max(1, wish.chunk_tokens // extent.tokens))
        return Lengths(chunk, chunk)
    chunk = _even(extent, max(1, _rows(extent, accumulate) // extent.tokens))
    return Lengths(chunk, _bounded(extent, FORWARD_FACTOR * chunk) if recomputes else chunk)


def _rows(extent: Extent, accumulate: Accumulate) -> int:
    """Tokens of a chunk.

    A float32 sum is twice the traffic, and its cast in the end takes memory that the chunks may use before: shorter
    ones would cost time and save nothing.
    """
    aim = CHUNK_BYTES * extent.tokens // max(1, extent.widest)
    rows = int(min(MAX_ROWS * extent.sharing, max(MIN_ROWS * extent.sharing, aim)))
    if accumulate == "float32" and extent.wide:
        rows = max(rows, extent.cast * extent.tokens // extent.wide)
    return max(rows - rows % TILE, min(rows, TILE))


def shorter(terms: Terms, lengths: Lengths) -> Lengths | None:
    """Half as long; None where the user has fixed the length, or where no product of that many rows is worth it."""
    extent = terms.extent
    half = _even(extent, -(-lengths.chunk // 2))
    if terms.wish.fixes_length or half >= lengths.chunk or half * extent.tokens < LEAST_ROWS * extent.sharing:
        return None
    return Lengths(half, half)


def longer(terms: Terms, lengths: Lengths) -> Lengths | None:
    """About twice as long; None where the user has fixed the length, or where one would be the only or a ragged one."""
    extent = terms.extent
    double = _even(extent, 2 * lengths.chunk)
    ragged = extent.length % double > 0 and extent.length % lengths.chunk == 0
    if terms.wish.fixes_length or double >= extent.length or (ragged and not extent.dynamic):
        return None
    return Lengths(double, max(double, lengths.forward))


def _even(extent: Extent, chunk: int) -> int:
    """About that many positions, in chunks of equal length; as many as leave none ragged, if that is near."""
    if extent.dynamic:
        return chunk
    fewest, most = (max(1, ceil(extent.length / (chunk * near))) for near in (NEAR, 1 / NEAR))
    whole = (count for count in range(fewest, most + 1) if extent.length % (count * ALIGNMENT) == 0)
    even = -(-extent.length // next(whole, ceil(extent.length / chunk)))
    return _bounded(extent, -(-even // ALIGNMENT) * ALIGNMENT)


def _bounded(extent: Extent, chunk: int) -> int:
    return chunk if extent.dynamic else min(extent.length, chunk)
