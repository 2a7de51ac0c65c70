"""The decisions for the regions of one graph, in words and numbers."""

from __future__ import annotations

from dataclasses import dataclass

from mst_fx.core.readable import readable
from mst_fx.plan.choices import REAL_SHARE, Choices, State, changed
from mst_fx.plan.chunk_length import in_chunks, policy_of
from mst_fx.plan.lengths import Lengths

COUNTS = (2, 4, 8, 16)
"""Numbers of chunks that a plan is compared with, to tell what shorter chunks would save and cost."""
OPTION = "num_chunks"
"""The option for other numbers of chunks; regions whose number is another option keep theirs."""
ONE_CHUNK = "it would be one chunk, at the length that is chosen"
IN_VAIN = "One chunk saves nothing: set chunk_tokens or num_chunks, so that there are several."


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
        note: what else to say of its loop.
    """

    lengths: Lengths | None
    chunks: int = 1
    bytes_before: int = 0
    bytes_after: int = 0
    added_ms: float = 0.0
    reason: str = ""
    advice: str = ""
    note: str = ""


@dataclass(frozen=True)
class Plans:
    """The decisions for one graph.

    Attributes:
        of: one plan for each region, in the order of the offers.
        peak: predicted peak bytes of a training step.
        peak_whole: the same without any loop.
        budget: bytes that the user allows, None without a budget.
        advice: what would help, where no plan keeps to the budget.
        leaner: what shorter chunks would save and cost, where they take a real share off the peak.
        offloaded: number of blocks that keep on the host what they save, the first of `Timeline.stops`.
    """

    of: tuple[Plan, ...]
    peak: int
    peak_whole: int
    budget: int | None = None
    advice: str = ""
    leaner: str = ""
    offloaded: int = 0


def plan_of(choices: Choices, number: int, state: State) -> Plan:
    """Return the decision for the region of this number."""
    offer, lengths = choices.offers[number], state[number]
    memory, length = offer.memory, offer.extent.length
    if lengths is None:
        reason = _reason(choices, number, state)
        if offer.extent.dynamic and offer.wish.loop is None:
            reason += f" (for the length {length}; mark_dynamic(..., hint_override=) names another)"
        return Plan(None, bytes_before=memory.written, reason=reason, advice=_advice(choices, number))
    positions = min(lengths.chunk, length)
    return Plan(
        lengths,
        chunks=-(-length // positions),
        bytes_before=memory.written,
        bytes_after=memory.written * positions // length + memory.stream_gradient,
        added_ms=choices.added_ms(number, lengths),
        note=IN_VAIN if _is_in_vain(choices, number, state) else "",
    )


def _reason(choices: Choices, number: int, state: State) -> str:
    """Return why a region is left alone."""
    if choices.offers[number].wish.loop is False:
        return "the option `modules` says so"
    if number not in choices.candidates:
        written = choices.offers[number].memory.written
        return f"its temporaries are {readable(written)}, min_bytes is {readable(choices.config.least_bytes)}"
    others = [n for n in choices.candidates if state[n] is None]
    peak = choices.peak(state)
    lower = choices.peak(changed(state, {n: choices.lengths[n] for n in others}))
    added = sum(choices.added_ms(n, choices.lengths[n]) for n in others)
    left = "the region that is" if len(others) == 1 else f"the {len(others)} regions that are"
    return (
        f"not worth it: looping {left} left alone would take "
        f"{readable(max(0, peak - lower))} off a step's peak of {readable(peak)} and add {added:.1f} ms (predicted)"
        + (f"; {ONE_CHUNK}" if choices.is_one_chunk(number) else "")
    )


def _is_in_vain(choices: Choices, number: int, state: State) -> bool:
    """Return whether a region's loop is one chunk, whatever length may come, and takes nothing off the peak."""
    offer = choices.offers[number]
    if not choices.is_one_chunk(number) or offer.due or offer.extent.dynamic:
        return False
    return choices.peak(changed(state, {number: None})) <= choices.peak(state)


def _advice(choices: Choices, number: int) -> str:
    """Return how a region that is left alone would be looped."""
    policy = policy_of(choices.offers[number].extent)
    if policy.option == OPTION and number in choices.candidates and choices.is_one_chunk(number):
        return "Set chunk_tokens or num_chunks, so that it is more than one chunk."
    return policy.advice


def leaner(choices: Choices, state: State) -> str:
    """Return what shorter chunks would save and cost, "" where they take no real share off the peak."""
    option, peak, least, added = "", choices.peak(state), choices.peak(state), 0.0
    policies = [policy_of(offer.extent) for offer in choices.offers]
    kept = {n: lengths for n, lengths in enumerate(state) if policies[n].option != OPTION}
    for count in COUNTS:
        lengths = [in_chunks(offer.terms, count) for offer in choices.offers]
        finer = changed(choices.looped(choices.candidates, lengths), kept)
        if choices.peak(finer) < least:
            option, least = f"{OPTION}={count}", choices.peak(finer)
            added = choices.time(finer) - choices.time(state)
    if least > (1 - REAL_SHARE) * peak:
        return ""
    return f"{option} would take {readable(peak - least)} more off the peak, and add {added:.1f} ms a step (predicted)"


def what_would_help(choices: Choices, state: State, missing: int) -> str:
    """Return what would help where no state keeps to the budget.

    Args:
        choices: of the graph.
        state: the leanest one.
        missing: bytes by which it is above the budget.
    """
    advice = [f"{readable(missing)} more"]
    memories = [offer.memory for offer, lengths in zip(choices.offers, state, strict=True) if lengths is not None]
    loops = [memory.backward or memory.forward for memory in memories]
    sums = max((loop.sums - loop.native for loop in loops), default=0)
    if sums > 0:
        advice.append(f"accumulate='native' (float32 sums take {readable(sums)} more than the gradients)")
    saved = sum(segment.saved for segment in choices.timeline.segments if segment.block is None)
    if saved > 0:
        advice.append(f"activation checkpointing ({readable(saved)} are saved for backward outside of the regions)")
    return ", ".join(advice)
