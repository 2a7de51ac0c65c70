"""Policy for axes of heads: how many heads of the keys a group has, with the heads of the queries that share them."""

from __future__ import annotations

from mst_fx.core.config import Accumulate, Wish
from mst_fx.plan.lengths import Lengths
from mst_fx.predict.extent import Extent

GROUP_BYTES = 2**28
"""Target bytes of the queries of a group."""
LEAST_GROUP_BYTES = 2**23
"""The queries of a group have at least so many bytes, which is enough for two blocks of 128 of them on each of the
multiprocessors of a large device: attention runs in one block for so many queries of a head. This is a choice."""


class OverHeads:
    """Loops over groups of heads (see `AxisPolicy`), which are all of one size, and cost more time than others."""

    option, is_cheap = "head_groups", False
    advice = "Set head_groups, or name the module in `modules`."

    def default(self, extent: Extent, wish: Wish, accumulate: Accumulate, *, recomputes: bool) -> Lengths:
        """Return as many heads as the user wishes, or about GROUP_BYTES of queries."""
        if wish.num_chunks is not None:
            return _alike(min(each for each in _groups(extent) if each * wish.num_chunks >= extent.length))
        fitting = (each for each in _groups(extent) if each * extent.widest <= GROUP_BYTES)
        return _alike(max(fitting, default=1))

    def shorter(self, extent: Extent, lengths: Lengths) -> Lengths | None:
        """Return the next smaller group; None where it has less than LEAST_GROUP_BYTES of queries."""
        smaller = [each for each in _groups(extent) if each < lengths.chunk]
        enough = [each for each in smaller if each * extent.widest >= LEAST_GROUP_BYTES]
        return _alike(max(enough)) if enough else None

    def longer(self, extent: Extent, lengths: Lengths) -> Lengths | None:
        """Return the next larger group that has not all heads; None where there is none."""
        larger = [each for each in _groups(extent) if lengths.chunk < each < extent.length]
        return _alike(min(larger)) if larger else None

    def fewest(self, extent: Extent) -> int:
        """Return the largest group that has not all heads; all, where there is one head."""
        return max((each for each in _groups(extent) if each < extent.length), default=extent.length)

    def in_chunks(self, extent: Extent, count: int) -> Lengths | None:
        """Return None: the number of groups is an option of its own."""
        return None


def _alike(group: int) -> Lengths:
    return Lengths(group, group)


def _groups(extent: Extent) -> list[int]:
    """Return the numbers of heads that divide all heads into groups of one size."""
    return [each for each in range(1, extent.length + 1) if extent.length % each == 0]
