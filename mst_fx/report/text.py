"""The text of a report: it fits a terminal, and tells once what is alike."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from mst_fx.core.readable import readable
from mst_fx.core.refusal import Reason
from mst_fx.report.alike import alike
from mst_fx.report.how_sure import text_of as text_of_how_sure
from mst_fx.report.items import RefusedRegion
from mst_fx.report.lines import prose, several
from mst_fx.report.timeline import peaks_of, places_of, rows_of
from mst_fx.report.unlooped import text_of as text_of_unlooped

if TYPE_CHECKING:
    from mst_fx.report.report import Report


def text_of(report: Report) -> str:
    """Return a report as text."""
    entries = [*_entries(report), *text_of_unlooped(report.unlooped)] if report.graphs else []
    return "\n".join([*head_of(report), *entries, *(line for note in report.notes for line in prose(note))])


def head_of(report: Report) -> list[str]:
    """Return the lines that a report begins with: how much is looped, the peak, and what to change first."""
    first = prose(f"change first: {report.change_first}") if report.change_first else []
    return [_head(report), *_peak(report), *first]


def _head(report: Report) -> str:
    if not report.graphs:
        return "mst_fx: no graph was captured, so there was nothing to decide"
    graphs = several(report.graphs, "graph")
    if not (report.regions or report.cuts or report.dropped or report.refusals):
        return f"mst_fx: nothing to loop in {graphs}: no pattern matched"
    return f"mst_fx: {len(report.regions)} looped, {len(left_alone(report))} left alone, {graphs}"


def left_alone(report: Report) -> list[RefusedRegion]:
    """Return the refusals of regions: a budget that is missed is none, nor is what stays on the device."""
    return [each for each in report.refusals if each.reason != Reason.BUDGET.name and each.pattern != "offload"]


def _peak(report: Report) -> Iterator[str]:
    """Yield the peak, what is alive then, and by how much a budget is missed."""
    if report.peak_whole:
        changed = report.peak != report.peak_whole
        peaks = f"{readable(report.peak_whole)} -> {readable(report.peak)}" if changed else readable(report.peak)
        largest = f" (largest of {report.graphs} graphs)" if report.graphs > 1 else ""
        yield f"peak of a step{largest}: {peaks} (predicted{', without and with loops' if changed else ''})"
    if report.peak_whole and report.timelines:
        before, after = peaks_of(report.timelines)
        yield from prose(f"alive then: {places_of(before, after)}", "  ")
        yield from rows_of(before, after)
    yield from text_of_how_sure(report.unknown_ops, report.side_by_side, report.peak_whole)
    if report.offloaded:
        sent = sum(each.bytes for each in report.offloaded)
        yield f"on the host between forward and backward: {readable(sent)} a step"
    missed = [refusal.text for refusal in report.refusals if refusal.reason == Reason.BUDGET.name]
    yield from (f"memory_budget missed: {text}" for text in missed)
    if report.budget is not None and not missed:
        yield f"memory_budget kept: {readable(report.budget)} allowed"


def _entries(report: Report) -> Iterator[str]:
    """Yield the decisions, those that are alike once; an advice that stands just above is not told again."""
    listed: list[tuple[Any, list[Any]]] = [
        each for entries in (report.regions, report.cuts, report.dropped, report.offloaded) for each in alike(entries)
    ]
    for entry, group in listed:
        yield from entry.lines(len(group))
    above = ""
    stays = [refusal for refusal in report.refusals if refusal.pattern == "offload"]
    for refusal, refusals in [*alike(left_alone(report)), *alike(stays if not report.offloaded else [])]:
        yield from refusal.lines(len(refusals), briefly=refusal.advice == above)
        above = refusal.advice
