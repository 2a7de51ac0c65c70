"""How long a mini-sequence is: as the user says, else long enough for its matrix products to be fast. Policy."""

from __future__ import annotations

from dataclasses import dataclass

from mst_fx.config import Accumulate, Wish

CHUNK_BYTES: dict[Accumulate, int] = {"float32": 2**30, "native": 2**28}
"""Aim for the widest matrix product of a chunk (bytes).

A float32 accumulator is twice the traffic a chunk, and half as much memory again is for its cast in the end: shorter
chunks would cost time and save nothing.
"""
MIN_ROWS, MAX_ROWS = 1024, 7680
"""Rows that a matrix meets in a chunk: one a token, fewer where tokens are shared out among experts.

Below, matmuls lose speed; above, they gain less than 1 % for memory in proportion (SwiGLU of 8B, H200)."""
LEAST_ROWS = 128
"""No budget makes chunks shorter: products would lose more than half of their speed."""
FORWARD_FACTOR = 2
"""A forward chunk needs a third of the memory that its gradients need, so a recomputing region's may be longer."""
ALIGNMENT = 16
"""Chunk lengths are multiples of it where there is a choice, so that every chunk starts aligned."""


@dataclass(frozen=True)
class Extent:
    """The axis of a region, and how wide its products are.

    Attributes:
        length: positions of the axis, as captured.
        dynamic: whether the length may be another at run time.
        tokens: rows of the stream behind one position: the batch, where the axis is the sequence.
        widest: bytes that the widest product (or value, where there is none) holds for one position.
        sharing: tokens for each row that a matrix meets: 1, or more where tokens are shared out among experts.
    """

    length: int
    dynamic: bool
    tokens: int
    widest: int
    sharing: float = 1.0


@dataclass(frozen=True)
class Lengths:
    """Positions of one mini-sequence.

    Attributes:
        chunk: in the loop that computes gradients, if any.
        forward: in the loop that computes results only.
    """

    chunk: int
    forward: int


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
    tokens = max(1, CHUNK_BYTES[accumulate] * extent.tokens // max(1, extent.widest))
    rows = min(MAX_ROWS * extent.sharing, max(MIN_ROWS * extent.sharing, 1 << (tokens.bit_length() - 1)))
    chunk = _even(extent, max(1, int(rows) // extent.tokens))
    return Lengths(chunk, _bounded(extent, FORWARD_FACTOR * chunk) if recomputes else chunk)


def shorter(extent: Extent, wish: Wish, lengths: Lengths) -> Lengths | None:
    """Half as long; None where the user has fixed the length, or where no product of that many rows is worth it."""
    half = _even(extent, -(-lengths.chunk // 2))
    fixed = wish.num_chunks is not None or wish.chunk_tokens is not None
    if fixed or half >= lengths.chunk or half * extent.tokens < LEAST_ROWS * extent.sharing:
        return None
    return Lengths(half, half)


def _even(extent: Extent, chunk: int) -> int:
    """At most about that many positions, in chunks of equal length."""
    if extent.dynamic:
        return chunk
    even = -(-extent.length // -(-extent.length // chunk))
    return _bounded(extent, -(-even // ALIGNMENT) * ALIGNMENT)


def _bounded(extent: Extent, chunk: int) -> int:
    return chunk if extent.dynamic else min(extent.length, chunk)
