"""The choices that a plan has for one graph, and what each costs: peak bytes and milliseconds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

from mst_fx.core.config import Config
from mst_fx.plan.chunk_length import policy_of, several, shorter
from mst_fx.plan.lengths import Lengths
from mst_fx.plan.offer import Offer, held
from mst_fx.predict.step_memory import Timeline
from mst_fx.predict.time import Device

REAL_SHARE = 0.1
"""What takes less than this share off the peak of a step is no reason to recompute, nor worth telling."""

State: TypeAlias = tuple[Lengths | None, ...]
"""For each region the lengths of its chunks, None for no loop."""


class Choices:
    """What may be chosen for the regions of one graph.

    Args:
        offers: one for each region.
        timeline: the rest of the graph.
        device: the device that the graph runs on.
        config: the user's options.

    Attributes:
        lengths: those that each region's loop is judged by.
        candidates: numbers of the regions that may be looped.
        unlooped: the state without loops.
    """

    def __init__(self, offers: Sequence[Offer], timeline: Timeline, device: Device, config: Config) -> None:
        self.offers, self.timeline, self.device, self.config = offers, timeline, device, config
        self.lengths = [several(offer.terms, demanded=self.must_be_looped(n)) for n, offer in enumerate(offers)]
        self.candidates = [number for number in range(len(offers)) if self._may_be_looped(number)]
        self.unlooped: State = (None,) * len(offers)

    def _may_be_looped(self, number: int) -> bool:
        offer = self.offers[number]
        large = offer.due or offer.memory.written >= self.config.least_bytes
        return large if offer.wish.loop is None else offer.wish.loop

    def must_be_looped(self, number: int) -> bool:
        """Return whether a region that may be looped has to be, whatever that saves."""
        offer = self.offers[number]
        given = offer.wish.loop is not None or offer.wish.fixes_length
        asked = self.config.min_bytes is not None or offer.due or offer.communicates
        return given or (asked and policy_of(offer.extent).is_cheap)

    def offloading(self, blocks: int) -> Choices:
        """Return the same with so many blocks that keep on the host what they save."""
        return Choices(self.offers, self.timeline.offloading(blocks), self.device, self.config)

    def looped(self, numbers: Iterable[int], lengths: Sequence[Lengths]) -> State:
        """Return the state in which these regions are looped, with these lengths for each region of the graph."""
        return changed(self.unlooped, {n: lengths[n] for n in numbers})

    def is_free(self, number: int) -> bool:
        """Return whether the rest of the graph and the device may decide how long the chunks of a region are."""
        return not self.offers[number].communicates

    def half(self, number: int, lengths: Lengths) -> Lengths | None:
        """Return half the length of a region's chunks, None where they may not be shorter."""
        return shorter(self.offers[number].terms, lengths) if self.is_free(number) else None

    def is_one_chunk(self, number: int) -> bool:
        """Return whether a region's loop would be one chunk."""
        return self.lengths[number].chunk >= self.offers[number].extent.length

    def peak(self, state: State) -> int:
        """Return the predicted peak bytes of a training step."""
        return self.timeline.peak([held(offer, lengths) for offer, lengths in zip(self.offers, state, strict=True)])

    def added_ms(self, number: int, lengths: Lengths) -> float:
        """Return the predicted milliseconds that a region's loop adds to a training step."""
        offer = self.offers[number]
        length = offer.extent.length
        return offer.cost.added_ms(self.device, min(lengths.chunk, length), length, repeated=offer.repeated)

    def time(self, state: State) -> float:
        """Return the predicted milliseconds that all loops add to a training step."""
        return sum(self.added_ms(number, lengths) for number, lengths in enumerate(state) if lengths)


def changed(state: State, changes: Mapping[int, Lengths | None]) -> State:
    """Return a state with other lengths for the regions of these numbers."""
    return tuple(changes.get(number, lengths) for number, lengths in enumerate(state))
