"""A report as a table of HTML, for notebooks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from html import escape
from typing import TYPE_CHECKING

from mst_fx.core.readable import readable
from mst_fx.report.alike import alike
from mst_fx.report.lines import at, several, source_clipped, times
from mst_fx.report.text import head_of, left_alone

if TYPE_CHECKING:
    from mst_fx.report.report import Report

SOURCE = 80
"""The most columns of a source line."""
Row = tuple[str, ...]
"""What it is, where, its bytes, what is to be said of it, and the source line."""


def html_of(report: Report) -> str:
    """Return a report as HTML: what its text begins with, and a row for each kind of decision. All text is escaped."""
    begins = escape("\n".join(head_of(report)))
    rows = [_row(row) for row in _rows(report)]
    heads = "".join(f"<th>{head}</th>" for head in ("what", "where", "bytes", "decision", "source"))
    table = f"<table><thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table>" if rows else ""
    notes = "".join(f"<p>{escape(note)}</p>" for note in report.notes)
    return f"<div><pre>{begins}</pre>{table}{notes}</div>"


def _row(cells: Iterable[str]) -> str:
    return f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>"


def _rows(report: Report) -> Iterator[Row]:
    for region, regions in alike(report.regions):
        told = f"{several(region.chunks, 'chunk')} of {region.axis}, {region.added_ms:+.1f} ms a step"
        sizes = f"{readable(region.bytes_before)} -> {readable(region.bytes_after)}"
        yield _named(f"{times(len(regions))}{region.pattern}", region.module, sizes, told, region.source)
    for cut, cuts in alike(report.cuts):
        sizes = f"{readable(cut.bytes_before)} -> {readable(cut.bytes_after)}"
        yield _named(f"{times(len(cuts))}head", cut.module, sizes, "cut before the projection", cut.source)
    for gone, values in alike(report.dropped):
        yield _named(
            f"{times(len(values))}logits", gone.module, readable(gone.bytes), "nothing is returned", gone.source
        )
    for sent, group in alike(report.offloaded):
        told = "on the host until backward"
        yield _named(f"{times(len(group))}value", sent.module, readable(sent.bytes), told, sent.source)
    for refusal, refusals in alike(left_alone(report)):
        told = f"left alone ({refusal.reason}): {refusal.text}. {refusal.advice}"
        yield _named(f"{times(len(refusals))}{refusal.pattern}", refusal.module, "", told, refusal.source)
    for value in report.unlooped:
        told = f"not looped: {value.why}. {value.advice}"
        yield _named(f"{times(value.count)}{value.op}", value.module, readable(value.bytes), told, value.source)


def _named(what: str, module: str, size: str, told: str, source: str) -> Row:
    return what, at(module), size, told, source_clipped(source, SOURCE)
