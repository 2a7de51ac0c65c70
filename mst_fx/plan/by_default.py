"""Without a budget: loops that are worth it, in chunks that cost little time."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence

from mst_fx.plan.choices import REAL_SHARE, Choices, State, changed
from mst_fx.plan.chunk_length import longer
from mst_fx.plan.lengths import Lengths
from mst_fx.plan.offer import Offer

NO_RECOMPUTE_SHARE = 0.02
"""All loops that recompute nothing have to take at least this share off the peak of a step, the others REAL_SHARE:
those over tokens together, and then those over heads. These are choices."""
OWN_SHARE = 0.004
"""Each of them holds at least this share of the peak: 25 of the smallest that count make REAL_SHARE. This is a choice;
no measurement of it is on record."""
LENT_SHARE = 0.125
"""Longer chunks may take back this share of what all loops take off the peak: they sum gradients less often."""
CHEAP_SHARE, CHEAP_MS = 0.01, 1.0
"""Shorter chunks that take REAL_SHARE off the peak may add this share of the time of the products in all regions,
or so many milliseconds to a step, whichever is more: where chunks are small, the host's time for them is all there is.
Both are choices."""
ROUNDS = 4
"""How often the chunks of all regions are halved in search of a lower peak."""


def worth_it(choices: Choices) -> State:
    """Loop what is worth it, in chunks of the default length, or in shorter ones where these cost next to nothing.

    All chunks are halved together, as a peak may be made by several regions; those that do not make it get longer
    ones again.
    """
    state = _worth_looping(choices, choices.lengths)
    if choices.config.min_bytes is not None:
        return state
    state, lengths = _with_longer_chunks(choices, state), choices.lengths
    for _ in range(ROUNDS):
        halves = [choices.half(number, own) or own for number, own in enumerate(lengths)]
        if halves == lengths:
            break
        lengths = halves
        finer = _with_longer_chunks(choices, _worth_looping(choices, lengths))
        if choices.peak(finer) <= (1 - REAL_SHARE) * choices.peak(state) and _is_cheap(choices, finer, state):
            state = finer
    return state


def _worth_looping(choices: Choices, lengths: Sequence[Lengths]) -> State:
    """Loop what recomputes nothing, if that saves memory; loop the rest where it is a real share of the peak.

    Attention is judged by itself, as its loops cost most for what they save; all heads at once are no reason to loop.
    """
    is_whole = choices.is_one_chunk
    state = more = choices.looped((n for n in choices.candidates if choices.must_be_looped(n)), lengths)
    for share, kind in ((NO_RECOMPUTE_SHARE, "free"), (REAL_SHARE, "tokens"), (REAL_SHARE, "heads")):
        before, more = choices.peak(state), state if kind == "heads" else more
        large = [n for n in choices.candidates if more[n] is None and _own_bytes(choices, n) >= OWN_SHARE * before]
        chosen = [n for n in large if _kind(choices.offers[n]) == kind and not (kind == "heads" and is_whole(n))]
        more = _without_harm(choices, changed(more, {n: lengths[n] for n in chosen}), chosen)
        state = more if before - choices.peak(more) >= share * before else state
    return state


def _kind(offer: Offer) -> str:
    return offer.extent.over if offer.recomputes else "free"


def _is_cheap(choices: Choices, finer: State, state: State) -> bool:
    """Return whether a state adds next to no time to another one, of which it is the finer one."""
    rate = choices.device.flops_per_ms
    products = sum(3 * offer.cost.flops / rate for offer in choices.offers)
    return choices.time(finer) - choices.time(state) <= max(CHEAP_MS, CHEAP_SHARE * products)


def _with_longer_chunks(choices: Choices, state: State) -> State:
    """Double the chunks where the peak allows it; regions that are alike share their bodies, and change together.

    It does not matter which come first: a chunk's length changes only the peak of its own region's loop.
    """
    peak = choices.peak(state)
    limit = peak + LENT_SHARE * (choices.peak(choices.unlooped) - peak)
    alike: dict[Hashable, dict[int, Lengths]] = {}
    for number, lengths in enumerate(state):
        double = longer(choices.offers[number].terms, lengths) if lengths and choices.is_free(number) else None
        if double:
            offer = choices.offers[number]
            alike.setdefault((offer.extent, offer.memory, offer.cost, double), {})[number] = double
    for group in alike.values():
        doubled = changed(state, group)
        state = doubled if choices.peak(doubled) <= limit else state
    return state


def _without_harm(choices: Choices, state: State, numbers: Iterable[int]) -> State:
    """Leave out the loops among these that raise the peak, as a large sum for a small region may."""
    for number in numbers:
        fewer = changed(state, {number: None})
        state = fewer if choices.peak(fewer) < choices.peak(state) else state
    return state


def _own_bytes(choices: Choices, number: int) -> int:
    memory = choices.offers[number].memory
    return max(memory.whole_forward, memory.whole_backward, memory.saved_whole)
