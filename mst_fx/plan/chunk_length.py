"""Policy: how long a chunk is. The user says so; otherwise what its axis is of decides: tokens, or heads."""

from __future__ import annotations

from mst_fx.core.config import Accumulate, Wish
from mst_fx.plan.lengths import AxisPolicy, Lengths, Terms
from mst_fx.plan.over_heads import OverHeads
from mst_fx.plan.over_tokens import OverTokens
from mst_fx.predict.extent import Extent

POLICIES: dict[str, AxisPolicy] = {"tokens": OverTokens(), "heads": OverHeads()}


def policy_of(extent: Extent) -> AxisPolicy:
    """Return what is decided apart for the kind of an axis."""
    return POLICIES[extent.over]


def terms_of(extent: Extent, wish: Wish, accumulate: Accumulate, *, recomputes: bool) -> Terms:
    """Return the default lengths and what they depend on; for the arguments see `default_lengths`."""
    return Terms(extent, wish, default_lengths(extent, wish, accumulate, recomputes=recomputes))


def default_lengths(extent: Extent, wish: Wish, accumulate: Accumulate, *, recomputes: bool) -> Lengths:
    """Return the lengths that the user fixes, or those that are chosen.

    Args:
        extent: numbers of the region's axis.
        wish: the user's wish for this region.
        accumulate: dtype of the sums, which every chunk reads and writes once.
        recomputes: whether the forward has a loop of its own, whose chunks can be longer.
    """
    return policy_of(extent).default(extent, wish, accumulate, recomputes=recomputes)


def shorter(terms: Terms, lengths: Lengths) -> Lengths | None:
    """Return the next shorter lengths; None where the user fixes them, or the device would have too little to do."""
    return None if terms.wish.fixes_length else policy_of(terms.extent).shorter(terms.extent, lengths)


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
    few = policy_of(terms.extent).fewest(terms.extent)
    return Lengths(few, few) if demanded and lengths.chunk >= length else lengths


def in_chunks(terms: Terms, count: int) -> Lengths:
    """Return the lengths of so many chunks; the default where the user fixes it, or where they would be too short."""
    made = None if terms.wish.fixes_length else policy_of(terms.extent).in_chunks(terms.extent, count)
    return made or terms.lengths


def longer(terms: Terms, lengths: Lengths) -> Lengths | None:
    """Return the next longer lengths; None where the user fixes them, or a chunk would be the only or a ragged one."""
    return None if terms.wish.fixes_length else policy_of(terms.extent).longer(terms.extent, lengths)
