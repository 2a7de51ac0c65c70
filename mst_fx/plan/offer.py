"""What the planner knows of one region, and what the region holds with a choice of chunks."""

from __future__ import annotations

from dataclasses import dataclass

from mst_fx.core.config import Wish
from mst_fx.plan.lengths import Lengths, Terms
from mst_fx.predict.extent import Extent
from mst_fx.predict.region_memory import RegionMemory
from mst_fx.predict.step_memory import Held
from mst_fx.predict.time import RegionCost


@dataclass(frozen=True)
class Offer:
    """What the planner knows of one region.

    Attributes:
        terms: what its chunk lengths are chosen by.
        memory: bytes, as a function of the chunk length.
        cost: work and traffic, for the time.
        recomputes_nothing: whether a loop makes the gradients in the forward, or there are none.
        repeated: whether the region is in a checkpointed block, which backward recomputes in any case.
        saves_results: whether such a block saves the results of the region's loop nevertheless.
        due: whether it is looped even if it is small: its length varies, and it would be looped at a long one.
        communicates: whether its chunks meet those of other ranks, which have to make the same plan: it follows from
            the region's shapes and the options, and from nothing else of the graph or the device.
    """

    terms: Terms
    memory: RegionMemory
    cost: RegionCost
    recomputes_nothing: bool
    repeated: bool = False
    saves_results: bool = False
    due: bool = False
    communicates: bool = False

    @property
    def extent(self) -> Extent:
        """Numbers of the region's axis."""
        return self.terms.extent

    @property
    def wish(self) -> Wish:
        """The user's wish for the region."""
        return self.terms.wish

    @property
    def recomputes(self) -> bool:
        """Whether a loop recomputes what would not be recomputed without it."""
        return self.cost.once_more or not (self.recomputes_nothing or self.repeated)


def held(offer: Offer, lengths: Lengths | None) -> Held:
    """Return what a region holds, looped with these lengths, or not looped."""
    memory, length = offer.memory, offer.extent.length
    if lengths is None:
        backward = memory.whole_again if offer.repeated else memory.whole_backward
        return Held(memory.whole_forward, memory.saved_whole, max(0, backward - memory.saved_whole))
    chunk, forward = min(lengths.chunk, length), min(lengths.forward, length)
    backward = memory.backward.peak(chunk) + memory.prologue if memory.backward is not None else memory.rescaled
    saved_results = memory.forward.results if offer.saves_results else 0
    return Held(memory.forward.peak(forward) + memory.prologue, memory.saved, backward, saved_results)
