"""Policy: how many heads of the keys a group has, with the heads of the queries that share them."""

from __future__ import annotations

from mst_fx.core.config import Wish
from mst_fx.predict.extent import Extent

GROUP_BYTES = 2**28
"""Target bytes of the queries of a group."""
LEAST_GROUP_BYTES = 2**23
"""The queries of a group have at least so many bytes, which is enough for two blocks of 128 of them on each of the
multiprocessors of a large device: attention runs in one block for so many queries of a head. This is a choice."""


def default_group(extent: Extent, wish: Wish) -> int:
    """Return the heads of a group: as many as the user wishes, or about GROUP_BYTES of queries."""
    if wish.num_chunks is not None:
        return min(each for each in _groups(extent) if each * wish.num_chunks >= extent.length)
    return max((each for each in _groups(extent) if each * extent.widest <= GROUP_BYTES), default=1)


def smaller_group(extent: Extent, group: int, *, demanded: bool = False) -> int | None:
    """Return the next smaller number of heads of a group; None where the device would have too little to do.

    Args:
        extent: of the region.
        group: heads of a group.
        demanded: whether the user wants a loop, even if the device has too little to do.
    """
    least = 0 if demanded else LEAST_GROUP_BYTES
    return max((each for each in _groups(extent) if each < group and each * extent.widest >= least), default=None)


def larger_group(extent: Extent, group: int) -> int | None:
    """Return the next larger number of heads of a group that are not all heads; None where there is none."""
    return min((each for each in _groups(extent) if group < each < extent.length), default=None)


def _groups(extent: Extent) -> list[int]:
    """Return the numbers of heads that divide all heads into groups of one size."""
    return [each for each in range(1, extent.length + 1) if extent.length % each == 0]
