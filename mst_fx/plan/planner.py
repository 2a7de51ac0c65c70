"""Policy: offers, a timeline, a device, options -> which regions are looped, and how long their chunks are.

Plans depend only on shapes, options and the kind of device, so they are the same on every rank.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from mst_fx.core.config import Config, Wish
from mst_fx.core.readable import readable
from mst_fx.plan.chunk_length import Lengths, Terms, longer, shorter
from mst_fx.predict.extent import Extent
from mst_fx.predict.region_memory import RegionMemory
from mst_fx.predict.step_memory import Held, Timeline
from mst_fx.predict.time import Device, RegionCost

NO_RECOMPUTE_SHARE, SHARE_OF_PEAK = 0.02, 0.1
"""Regions are looped where that takes at least this share off the peak of a step: the first share is for all loops that
recompute nothing, the second for all others; ..."""
OWN_SHARE = 0.004
"""... each of them holds at least this share of the peak: 25 of the smallest that count make SHARE_OF_PEAK. This is a
choice, as the two above are; no measurement of it is on record."""
LENT_SHARE = 0.125
"""Longer chunks may take back this share of what all loops take off the peak: they sum gradients less often."""


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
        return not (self.recomputes_nothing or self.repeated)


@dataclass(frozen=True)
class Plan:
    """The decision for one region.

    Attributes:
        lengths: of its chunks, None where it is left alone.
        chunks: number of chunks, the ragged one included (at the captured length, where it varies).
        bytes_before, bytes_after: bytes of its temporaries as written, whole and for one chunk.
        added_ms: predicted milliseconds that the loop adds to a training step.
        reason: why it is left alone, with the numbers.
        advice: how it would be looped.
    """

    lengths: Lengths | None
    chunks: int = 1
    bytes_before: int = 0
    bytes_after: int = 0
    added_ms: float = 0.0
    reason: str = ""
    advice: str = ""


@dataclass(frozen=True)
class Plans:
    """The decisions for one graph.

    Attributes:
        of: one plan for each region, in the order of the offers.
        peak: predicted peak bytes of a training step.
        peak_whole: the same without any loop.
        budget: bytes that the user allows, None without a budget.
        advice: what would help, where no plan keeps to the budget.
        offloaded: number of blocks that keep on the host what they save, the first of `Timeline.stops`.
    """

    of: tuple[Plan, ...]
    peak: int
    peak_whole: int
    budget: int | None = None
    advice: str = ""
    offloaded: int = 0


State = tuple[Lengths | None, ...]
"""For each region the lengths of its chunks, None for no loop."""


def make_plans(offers: Sequence[Offer], timeline: Timeline, device: Device, config: Config) -> Plans:
    """Decide for all regions of a graph; return the plans, with predicted peaks in bytes and times in ms.

    Args:
        offers: one for each region.
        timeline: the rest of the graph.
        device: the device that the graph runs on.
        config: the user's options.
    """
    budget = config.budget_bytes(device.memory)
    captured = _Planner(offers, timeline, device, config)
    planner = captured.offloading(len(timeline.stops) if config.offload == "checkpoints" else 0)
    planner, state = (planner, planner.worth_it()) if budget is None else planner.within(budget)
    plans = tuple(planner.plan(number, state) for number in range(len(offers)))
    peak, whole = planner.peak(state), captured.peak(captured.unlooped)
    advice = planner.advice(state, peak - budget) if budget is not None and peak > budget else ""
    return Plans(plans, peak, whole, budget, advice, planner.timeline.offloaded)


class _Planner:
    """Searches the states of one graph."""

    def __init__(self, offers: Sequence[Offer], timeline: Timeline, device: Device, config: Config) -> None:
        self.offers, self.timeline, self.device, self.config = offers, timeline, device, config
        self.lengths = [offer.terms.lengths for offer in offers]
        self.candidates = [number for number in range(len(offers)) if self._may_be_looped(number)]
        self.unlooped: State = (None,) * len(offers)

    def _may_be_looped(self, number: int) -> bool:
        offer = self.offers[number]
        large = offer.due or offer.memory.written >= self.config.least_bytes
        return large if offer.wish.loop is None else offer.wish.loop

    def _must_be_looped(self, number: int) -> bool:
        offer = self.offers[number]
        given = self.config.min_bytes is not None or offer.wish.loop is not None or offer.wish.fixes_length
        return given or offer.due or offer.communicates

    def _is_free(self, number: int) -> bool:
        """Return whether the rest of the graph and the device may decide how long the chunks of a region are."""
        return not self.offers[number].communicates

    def peak(self, state: State) -> int:
        """Return the predicted peak bytes of a training step."""
        return self.timeline.peak([held(offer, lengths) for offer, lengths in zip(self.offers, state, strict=True)])

    def added_ms(self, number: int, lengths: Lengths) -> float:
        """Return the predicted milliseconds that a region's loop adds to a training step."""
        offer = self.offers[number]
        length = offer.extent.length
        return offer.cost.added_ms(self.device, min(lengths.chunk, length), length, repeated=offer.repeated)

    def worth_it(self) -> State:
        """Loop what recomputes nothing, if that saves memory; loop the rest where it is a real share of the peak."""
        state = more = self._looped(n for n in self.candidates if self._must_be_looped(n))
        for share, recomputes in ((NO_RECOMPUTE_SHARE, False), (SHARE_OF_PEAK, True)):
            before = self.peak(state)
            large = [n for n in self.candidates if more[n] is None and self._own_bytes(n) >= OWN_SHARE * before]
            chosen = [n for n in large if self.offers[n].recomputes is recomputes]
            more = self._without_harm(_with(more, {n: self.lengths[n] for n in chosen}), chosen)
            state = more if before - self.peak(more) >= share * before else state
        return self._with_longer_chunks(state) if self.config.min_bytes is None else state

    def _with_longer_chunks(self, state: State) -> State:
        """Double the chunks where the peak allows it; regions that are alike share their bodies, and change together.

        It does not matter which come first: a chunk's length changes only the peak of its own region's loop.
        """
        peak = self.peak(state)
        limit = peak + LENT_SHARE * (self.peak(self.unlooped) - peak)
        alike: dict[Hashable, dict[int, Lengths]] = {}
        for number, lengths in enumerate(state):
            double = longer(self.offers[number].terms, lengths) if lengths and self._is_free(number) else None
            if double:
                offer = self.offers[number]
                alike.setdefault((offer.extent, offer.memory, offer.cost, double), {})[number] = double
        for group in alike.values():
            changed = _with(state, group)
            state = changed if self.peak(changed) <= limit else state
        return state

    def _without_harm(self, state: State, numbers: Iterable[int]) -> State:
        """Leave out the loops among these that raise the peak, as a large sum for a small region may."""
        for number in numbers:
            fewer = _with(state, {number: None})
            state = fewer if self.peak(fewer) < self.peak(state) else state
        return state

    def within(self, budget: int) -> tuple[_Planner, State]:
        """Return the first state of a path, from cheap to expensive, that fits; the leanest state if none does.

        The path does not depend on the budget: a larger budget ends it sooner, so it never recomputes more. The state
        comes with the planner of the timeline that it belongs to.
        """
        path = list(self._path())
        peaks = [planner.peak(state) for planner, state in path]
        fitting = (place for place, peak in enumerate(peaks) if peak <= budget)
        return path[next(fitting, peaks.index(min(peaks)))]

    def offloading(self, blocks: int) -> _Planner:
        """Return the same with so many blocks that keep on the host what they save."""
        return _Planner(self.offers, self.timeline.offloading(blocks), self.device, self.config)

    def _path(self) -> Iterator[tuple[_Planner, State]]:
        """Yield states, each slower than the one before.

        First come the loops that recompute nothing. Then come the others, one by one: those in checkpointed blocks
        first, and those that free most bytes for their time first. Between the two, with offload="auto", block after
        block keeps on the host what it saves. Then chunks get shorter where a region holds most.
        """
        first = {n for n, offer in enumerate(self.offers) if offer.recomputes_nothing or offer.due or offer.wish.loop}
        first |= {n for n, offer in enumerate(self.offers) if offer.communicates}
        state = self._looped(first.intersection(self.candidates))
        yield self, state
        others = sorted((n for n in self.candidates if state[n] is None), key=self._price)
        repeated = [n for n in others if self.offers[n].repeated]
        for number in repeated:
            state = _with(state, {number: self.lengths[number]})
            yield self, state
        planner = self
        for blocks in range(1, len(self.timeline.stops) + 1) if self.config.offload == "auto" else ():
            planner = self.offloading(blocks)
            yield planner, state
        for number in others[len(repeated) :]:
            state = _with(state, {number: self.lengths[number]})
            yield planner, state
        while True:
            ways: dict[int, Lengths] = {}
            for number, lengths in enumerate(state):
                half = shorter(self.offers[number].terms, lengths) if lengths and self._is_free(number) else None
                ways.update({number: half} if half else {})
            if not ways:
                return
            most = max(self._holds(n, state) for n in ways)
            state = _with(state, {n: half for n, half in ways.items() if self._holds(n, state) == most})
            yield planner, state

    def _looped(self, numbers: Iterable[int]) -> State:
        return _with(self.unlooped, {n: self.lengths[n] for n in numbers})

    def _own_bytes(self, number: int) -> int:
        memory = self.offers[number].memory
        return max(memory.whole_forward, memory.whole_backward, memory.saved_whole)

    def _holds(self, number: int, state: State) -> int:
        """Return the most bytes that a region holds at once."""
        region = held(self.offers[number], state[number])
        return max(region.forward, region.backward + region.saved)

    def _price(self, number: int) -> tuple[bool, float]:
        """Return a sort key: checkpointed blocks first, then milliseconds for each byte that the loop frees."""
        offer = self.offers[number]
        freed = max(1, offer.memory.saved_whole - offer.memory.saved)
        return not offer.repeated, self.added_ms(number, self.lengths[number]) / freed

    def plan(self, number: int, state: State) -> Plan:
        """Return the decision for a region, in words and numbers."""
        offer, lengths = self.offers[number], state[number]
        memory, length = offer.memory, offer.extent.length
        if lengths is None:
            reason = self._reason(number, state)
            if offer.extent.dynamic and offer.wish.loop is None:
                reason += f" (for the length {length}; mark_dynamic(..., hint_override=) names another)"
            return Plan(None, bytes_before=memory.written, reason=reason, advice=self._advice(number))
        positions = min(lengths.chunk, length)
        after = memory.written * positions // length + memory.stream_gradient
        return Plan(lengths, -(-length // positions), memory.written, after, self.added_ms(number, lengths))

    def _reason(self, number: int, state: State) -> str:
        """Return why a region is left alone."""
        if self.offers[number].wish.loop is False:
            return "the option `modules` says so"
        if number not in self.candidates:
            written = self.offers[number].memory.written
            return f"its temporaries are {readable(written)}, min_bytes is {readable(self.config.least_bytes)}"
        others = [n for n in self.candidates if state[n] is None]
        peak = self.peak(state)
        lower = self.peak(_with(state, {n: self.lengths[n] for n in others}))
        added = sum(self.added_ms(n, self.lengths[n]) for n in others)
        left = "the region that is" if len(others) == 1 else f"the {len(others)} regions that are"
        return (
            f"not worth it: looping {left} left alone would take "
            f"{readable(max(0, peak - lower))} off a step's peak of {readable(peak)} and add {added:.1f} ms (predicted)"
            + ("; it would be one chunk, at the length that is chosen" if self._is_one_chunk(number) else "")
        )

    def _is_one_chunk(self, number: int) -> bool:
        return self.lengths[number].chunk >= self.offers[number].extent.length

    def _advice(self, number: int) -> str:
        """Return how a region that is left alone would be looped, "" where there is no more to say than its reason."""
        if number in self.candidates and self._is_one_chunk(number):
            return "Set chunk_tokens or num_chunks, so that it is more than one chunk."
        return "Set min_bytes lower (0 loops all), or name the module in `modules`."

    def advice(self, state: State, missing: int) -> str:
        """Return what would help where no state fits."""
        advice = [f"{readable(missing)} more"]
        memories = [offer.memory for offer, lengths in zip(self.offers, state, strict=True) if lengths is not None]
        loops = [memory.backward or memory.forward for memory in memories]
        sums = max((loop.sums - loop.native for loop in loops), default=0)
        if sums > 0:
            advice.append(f"accumulate='native' (float32 sums take {readable(sums)} more than the gradients)")
        saved = sum(segment.saved for segment in self.timeline.segments if segment.block is None)
        if saved > 0:
            advice.append(f"activation checkpointing ({readable(saved)} are saved for backward outside of the regions)")
        return ", ".join(advice)


def _with(state: State, changes: Mapping[int, Lengths | None]) -> State:
    return tuple(changes.get(number, lengths) for number, lengths in enumerate(state))


def held(offer: Offer, lengths: Lengths | None) -> Held:
    """Return what a region holds, looped with these lengths, or not looped."""
    memory, length = offer.memory, offer.extent.length
    if lengths is None:
        backward = memory.whole_again if offer.repeated else memory.whole_backward
        return Held(memory.whole_forward, memory.saved_whole, max(0, backward - memory.saved_whole))
    chunk, forward = min(lengths.chunk, length), min(lengths.forward, length)
    backward = memory.backward.peak(chunk) if memory.backward is not None else memory.rescaled
    saved_results = memory.forward.results if offer.saves_results else 0
    return Held(memory.forward.peak(forward), memory.saved, backward, saved_results)
