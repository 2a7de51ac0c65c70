"""Lengths of chunks, what they are chosen by, and what is decided apart for each kind of axis."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from mst_fx.core.config import Accumulate, Wish
from mst_fx.predict.extent import Extent


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


class AxisPolicy(Protocol):
    """What a plan decides apart for axes of tokens and for axes of heads.

    Attributes:
        option: the option that fixes the number of chunks.
        is_cheap: whether its loops cost next to no time, so that the option `min_bytes` asks for them, too.
        advice: how a region that is left alone would be looped.
    """

    option: str
    is_cheap: bool
    advice: str

    def default(self, extent: Extent, wish: Wish, accumulate: Accumulate, *, recomputes: bool) -> Lengths:
        """Return the lengths that the user fixes, or those that are chosen; arguments as for `default_lengths`."""

    def shorter(self, extent: Extent, lengths: Lengths) -> Lengths | None:
        """Return the next shorter lengths; None where the device would have too little to do."""

    def longer(self, extent: Extent, lengths: Lengths) -> Lengths | None:
        """Return the next longer lengths; None where a chunk would be the only one, or a ragged one."""

    def fewest(self, extent: Extent) -> int:
        """Return the longest length of more than one chunk, however little the device has to do in it."""

    def in_chunks(self, extent: Extent, count: int) -> Lengths | None:
        """Return the lengths of so many chunks; None where the device would have too little to do."""
