"""The text of a report: it fits a terminal, and tells once what is alike."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from mst_fx.core.readable import readable
from mst_fx.core.refusal import Reason
from mst_fx.report.alike import alike
from mst_fx.report.items import RefusedRegion
from mst_fx.report.lines import prose, several
from mst_fx.report.timeline import peaks_of, places_of, rows_of
from mst_fx.report.unlooped import text_of as text_of_unlooped

if TYPE_CHECKING:
    from mst_fx.report.report import Report


def text_of(report: Report) -> str:
    """Return a report as text."""
    lines = [_head(report)]
    if report.graphs:
        lines += [*_peak(report), *_first(report), *_entries(report), *text_of_unlooped(report.unlooped)]
    return "\n".join([*lines, *(line for note in report.notes for line in prose(note))])


def _head(report: Report) -> str:
    if not report.graphs:
        return "mst_fx: no graph was captured, so there was nothing to decide"
    graphs = several(report.graphs, "graph")
    if not (report.regions or report.cuts or report.dropped or report.refusals):
        return f"mst_fx: nothing to loop in {graphs}: no pattern matched"
    return f"mst_fx: {len(report.regions)} looped, {len(_left_alone(report))} left alone, {graphs}"


def _left_alone(report: Report) -> list[RefusedRegion]:
    return [refusal for refusal in report.refusals if refusal.reason != Reason.BUDGET.name]


def _peak(report: Report) -> Iterator[str]:
    """Yield the peak, what is alive then, and by how much a budget is missed."""
    if report.peak_whole:
        changed = report.peak != report.peak_whole
        peaks = f"{readable(report.peak_whole)} -> {readable(report.peak)}" if changed else readable(report.peak)
        several_graphs = ", of the graph that needs most" if len(report.timelines) > 1 else ""
        yield f"peak of a step{several_graphs}: {peaks} (predicted{', without and with loops' if changed else ''})"
    if report.peak_whole and report.timelines:
        before, after = peaks_of(report.timelines)
        yield from prose(f"alive then: {places_of(before, after)}", "  ")
        yield from rows_of(before, after)
    for refusal in report.refusals:
        if refusal.reason == Reason.BUDGET.name:
            yield f"memory_budget missed: {refusal.text}"


def _first(report: Report) -> list[str]:
    return prose(f"change first: {report.change_first}") if report.change_first else []


def _entries(report: Report) -> Iterator[str]:
    """Yield the decisions, those that are alike once; an advice that stands just above is not told again."""
    listed: Iterable[tuple[object, ...]] = (report.regions, report.cuts, report.dropped)
    for entries in listed:
        for entry, group in alike(entries):
            yield from entry.lines(len(group))
    above = ""
    for refusal, refusals in alike(_left_alone(report)):
        yield from refusal.lines(len(refusals), briefly=refusal.advice == above)
        above = refusal.advice
