"""Policy for axes of tokens: chunks that are long enough for fast matrix products, and even."""

from __future__ import annotations

from math import ceil

from mst_fx.core.config import Accumulate, Wish
from mst_fx.plan.lengths import Lengths
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


class OverTokens:
    """Loops over tokens (see `AxisPolicy`)."""

    option, is_cheap = "num_chunks", True
    advice = "Set min_bytes lower (0 loops all), or name the module in `modules`."

    def default(self, extent: Extent, wish: Wish, accumulate: Accumulate, *, recomputes: bool) -> Lengths:
        """Return the lengths that the user fixes; otherwise even chunks of about CHUNK_BYTES in the widest product."""
        if wish.num_chunks is not None:
            return _alike(max(1, -(-extent.length // wish.num_chunks)))
        if wish.chunk_tokens is not None:
            return _alike(_bounded(extent, max(1, wish.chunk_tokens // extent.tokens_per_position)))
        length = _even(extent, max(1, _rows(extent, accumulate) // extent.tokens_per_position))
        return Lengths(length, _bounded(extent, FORWARD_FACTOR * length) if recomputes else length)

    def shorter(self, extent: Extent, lengths: Lengths) -> Lengths | None:
        """Return half the length; None where products would have too few rows."""
        half = _even(extent, -(-lengths.chunk // 2))
        return _alike(half) if half < lengths.chunk and _has_rows(extent, half) else None

    def longer(self, extent: Extent, lengths: Lengths) -> Lengths | None:
        """Return about twice the length; None where a chunk would be the only or a ragged one."""
        double = _even(extent, 2 * lengths.chunk)
        ragged = extent.length % double > 0 and extent.length % lengths.chunk == 0
        if double >= extent.length or (ragged and not extent.dynamic):
            return None
        return Lengths(double, max(double, lengths.forward))

    def fewest(self, extent: Extent) -> int:
        """Return half the axis."""
        return -(-extent.length // 2)

    def in_chunks(self, extent: Extent, count: int) -> Lengths | None:
        """Return the length of so many chunks; None where products would have too few rows."""
        length = _even(extent, -(-extent.length // count))
        return _alike(length) if _has_rows(extent, length) else None


def _has_rows(extent: Extent, length: int) -> bool:
    """Return whether the products of chunks of a length have LEAST_ROWS rows."""
    return length * extent.tokens_per_position >= LEAST_ROWS * extent.sharing


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
