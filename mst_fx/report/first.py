"""What to change first: of all advice in a report, the one that is about most bytes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from mst_fx.core.readable import readable
from mst_fx.core.refusal import Reason
from mst_fx.report.items import LoopedRegion, RefusedRegion
from mst_fx.report.lines import at, times
from mst_fx.report.unlooped import Unlooped


def first_of(regions: Iterable[LoopedRegion], refusals: Iterable[RefusedRegion], unlooped: Iterable[Unlooped]) -> str:
    """Return the most valuable advice in one sentence, "" where there is none.

    A budget that is missed comes first, then what has most bytes, then the first refusal, whose bytes are unknown. What
    the planner leaves alone is not worth a change.
    """
    refused = [refusal for refusal in refusals if refusal.reason != Reason.SMALL.name and refusal.advice]
    missed = next((refusal.advice for refusal in refused if refusal.reason == Reason.BUDGET.name), "")
    sized = [*_values(list(unlooped)), *map(_returned, regions)]
    size, text = max(sized, default=(0, ""), key=lambda advice: advice[0])
    if missed or size:
        return missed or text
    return next((f"{refusal.pattern} at {at(refusal.module)}: {refusal.advice}" for refusal in refused), "")


def _values(unlooped: list[Unlooped]) -> Iterator[tuple[int, str]]:
    """Yield the advice about values that no loop covers, with bytes; checkpointing helps many at once."""
    for value in unlooped:
        if value.reason not in (Reason.SMALL.name, Reason.NO_GAIN.name) and value.advice:
            size = f"{times(value.count)}{readable(value.bytes)}"
            yield value.total, f"{size} of {value.op} at {at(value.module)}: {value.advice}"
    saved = sum(value.total for value in unlooped if value.saved and value.reason == Reason.NO_GAIN.name)
    yield saved, f"activation checkpointing: {readable(saved)} are saved for backward that no loop makes smaller"


def _returned(region: LoopedRegion) -> tuple[int, str]:
    size = region.returned_bytes + region.returned_gradient_bytes
    what = "returned logits and their gradient" if region.returned_gradient_bytes else "returned logits"
    told = f"{readable(size)} of {what} at {at(region.module)}"
    return size, f"{told}: returned_logits='drop' does without them in training"
