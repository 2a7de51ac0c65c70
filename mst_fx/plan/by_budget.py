"""Within a budget: the first state that fits, on a path from cheap to expensive."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from mst_fx.plan.choices import Choices, State, changed
from mst_fx.plan.lengths import Lengths
from mst_fx.plan.offer import held


def within(choices: Choices, budget: int) -> tuple[Choices, State]:
    """Return the first state of a path, from cheap to expensive, that fits; the leanest state if none does.

    The path does not depend on the budget: a larger budget ends it sooner, so it never recomputes more. The state
    comes with the choices of the timeline that it belongs to.
    """
    path = list(_path(choices))
    peaks = [each.peak(state) for each, state in path]
    fitting = (place for place, peak in enumerate(peaks) if peak <= budget)
    return path[next(fitting, peaks.index(min(peaks)))]


def _path(choices: Choices) -> Iterator[tuple[Choices, State]]:
    """Yield states, each slower than the one before.

    First come the loops that recompute nothing. Then come the others, one by one: those in checkpointed blocks
    first, and those that free most bytes for their time first. Between the two, with offload="auto", block after
    block keeps on the host what it saves. Then chunks get shorter where a region holds most.
    """
    first = {n for n, offer in enumerate(choices.offers) if offer.recomputes_nothing or offer.due or offer.wish.loop}
    first |= {n for n, offer in enumerate(choices.offers) if offer.communicates}
    state = choices.looped(first.intersection(choices.candidates), choices.lengths)
    yield choices, state
    others = sorted((n for n in choices.candidates if state[n] is None), key=partial(_price, choices))
    cheap = [n for n in others if not choices.offers[n].recomputes]
    for number in cheap:
        state = changed(state, {number: choices.lengths[number]})
        yield choices, state
    for blocks in range(1, len(choices.timeline.stops) + 1) if choices.config.offload == "auto" else ():
        choices = choices.offloading(blocks)
        yield choices, state
    for number in others[len(cheap) :]:
        state = changed(state, {number: choices.lengths[number]})
        yield choices, state
    while True:
        ways: dict[int, Lengths] = {}
        for number, lengths in enumerate(state):
            half = choices.half(number, lengths) if lengths else None
            ways.update({number: half} if half else {})
        if not ways:
            return
        most = max(_holds(choices, n, state) for n in ways)
        state = changed(state, {n: half for n, half in ways.items() if _holds(choices, n, state) == most})
        yield choices, state


def _holds(choices: Choices, number: int, state: State) -> int:
    """Return the most bytes that a region holds at once."""
    region = held(choices.offers[number], state[number])
    return max(region.forward, region.backward + region.saved)


def _price(choices: Choices, number: int) -> tuple[bool, float]:
    """Return a sort key: what checkpointed blocks recompute, then milliseconds for each byte that the loop frees."""
    offer = choices.offers[number]
    freed = max(1, offer.memory.saved_whole - offer.memory.saved)
    return offer.recomputes, choices.added_ms(number, choices.lengths[number]) / freed
