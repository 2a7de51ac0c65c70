"""A picture of a report: the bytes alive over a training step as predicted, without and with loops."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from itertools import accumulate
from os import PathLike
from typing import TYPE_CHECKING, Any

from mst_fx.core.readable import readable
from mst_fx.report.lines import clipped, several
from mst_fx.report.timeline import KINDS, Course, GraphTimeline, Span

if TYPE_CHECKING:
    from mst_fx.report.report import Report

COLOURS = {
    "parameters": "#8c96a3",
    "inputs": "#c3c9d0",
    "outputs": "#e0c36a",
    "gradients": "#7a9a6f",
    "saved": "#5b86b5",
    "running": "#c8694a",
}
UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10), ("B", 1))
LABELS, LETTERS = 40, 36
"""The most labels of regions in a picture, and the most characters of one."""
GRAPHS = 6
"""The most graphs in a picture: those with the highest peaks."""


def draw(report: Report, path: str | PathLike[str]) -> None:
    """Draw a report: for each graph two pictures over one another; graphs stand side by side, in their order.

    Args:
        report: with the timeline of each graph.
        path: of the file.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: the report has no graph.
    """
    try:
        figure_of = import_module("matplotlib.figure").Figure
    except ImportError as error:
        raise ImportError(
            'Report.plot needs matplotlib: pip install "mst-fx[plot]", or pip install matplotlib'
        ) from error
    drawn = _drawn(report.timelines)
    if not drawn:
        raise ValueError("mst_fx: the report has no timeline to draw: no graph was captured, or the pass failed")
    courses = (("without loops", False), ("with loops", True))[: 2 if report.regions else 1]
    figure = figure_of(figsize=(min(11 * len(drawn), 33), 1.5 + 3 * len(courses)), layout="constrained")
    axes = figure.subplots(len(courses), len(drawn), sharex="col", sharey=True, squeeze=False)
    top = max(timeline.peak(course) for timeline in drawn.values() for course in (timeline.whole, timeline.looped))
    unit, size = next((each for each in UNITS if top >= each[1]), UNITS[-1])
    for column, (number, timeline) in enumerate(drawn.items()):
        name = f"graph {number + 1} of {len(report.timelines)}, " if len(report.timelines) > 1 else ""
        for pictures, (title, with_loops) in zip(axes, courses, strict=True):
            picture, course = pictures[column], timeline.looped if with_loops else timeline.whole
            _stack(picture, timeline, course, size)
            _mark(picture, timeline, course, size)
            _shade(picture, [span for span in timeline.spans if span.looped or not with_loops])
            picture.set_title(f"{name}{title}: peak {readable(timeline.peak(course))}", loc="left", fontsize=11)
            picture.set_ylim(0, 1.22 * max(1, top) / size)
        _label(axes[-1][column], timeline.spans)
        axes[-1][column].set_xlabel("parts of the graph, in the order in which they run")
    for pictures in axes:
        pictures[0].set_ylabel(f"bytes alive ({unit})")
    handles, labels = axes[0][0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside lower center", ncols=len(COLOURS), frameon=False)
    figure.suptitle(_title(report, len(drawn)))
    figure.savefig(path, dpi=130)


def _drawn(timelines: tuple[GraphTimeline, ...]) -> dict[int, GraphTimeline]:
    """Return the graphs with the highest peaks by their numbers, in order."""
    numbers = sorted(range(len(timelines)), key=lambda number: -timelines[number].peak(timelines[number].whole))
    return {number: timelines[number] for number in sorted(numbers[:GRAPHS])}


def _title(report: Report, drawn: int) -> str:
    loops = several(len(report.regions), "loop")
    looped = f"with {loops} {readable(report.peak)}" if report.regions else "nothing is looped"
    title = f"Predicted memory of a training step: peak {readable(report.peak_whole)}, {looped}"
    if len(report.timelines) > 1:
        which = f"the {drawn} largest of " if drawn < len(report.timelines) else ""
        title += f" ({which}{len(report.timelines)} graphs, each by itself)"
    if report.budget is not None:
        title += f"; memory_budget {readable(report.budget)}{', missed' if report.peak > report.budget else ''}"
    return title


def _stack(picture: Any, timeline: GraphTimeline, course: Course, size: int) -> None:
    """Draw what is alive at each point, one kind over the other."""
    count = len(course.saved)
    kinds = {
        "parameters": [timeline.parameters] * count,
        "inputs": [timeline.inputs] * count,
        **{kind: getattr(course, kind) for kind in ("outputs", "gradients", "saved", "running")},
    }
    edges = range(count + 1)
    layers = list(accumulate(kinds.values(), lambda low, own: [a + b for a, b in zip(low, own, strict=True)]))
    below = [0] * count
    for kind, above in zip(kinds, layers, strict=True):
        picture.fill_between(
            edges,
            [each / size for each in (*below, below[-1])],
            [each / size for each in (*above, above[-1])],
            step="post",
            color=COLOURS[kind],
            label=KINDS[kind],
            linewidth=0,
            zorder=2,
        )
        below = list(above)
    picture.set_xlim(0, count)
    picture.spines[["top", "right"]].set_visible(False)
    picture.tick_params(axis="x", length=0, labelsize=7, labelrotation=90)


def _mark(picture: Any, timeline: GraphTimeline, course: Course, size: int) -> None:
    """Mark the peak, and where forward ends."""
    totals = course.totals()
    place, peak = max(range(len(totals)), key=totals.__getitem__), timeline.peak(course)
    picture.axhline(peak / size, color="black", linewidth=0.8, linestyle=":", zorder=3)
    right = place > len(totals) / 2
    picture.annotate(
        f"{readable(peak)}, {clipped(course.at, 70)}",
        (place + (0 if right else 1), peak / size),
        textcoords="offset points",
        xytext=(0, 4),
        ha="right" if right else "left",
        fontsize=8,
        bbox={"facecolor": "white", "alpha": 0.8, "linewidth": 0, "pad": 1},
        zorder=4,
    )
    picture.axvline(timeline.forward, color="black", linewidth=0.8, zorder=3)
    for x, phase in ((timeline.forward, "forward "), (timeline.forward, " backward")):
        picture.annotate(
            phase,
            (x, 1),
            xycoords=("data", "axes fraction"),
            textcoords="offset points",
            xytext=(0, -10),
            ha="right" if phase.startswith("f") else "left",
            fontsize=8,
        )


def _shade(picture: Any, spans: Iterable[Span]) -> None:
    """Shade where regions run."""
    for point in (point for span in spans for point in (span.forward, span.backward)):
        picture.axvspan(point, point + 1, color="black", alpha=0.09, linewidth=0, zorder=0)


def _label(picture: Any, spans: Iterable[Span]) -> None:
    """Name the regions below; of many, some."""
    places = {point: span for span in spans for point in (span.forward, span.backward)}
    points = sorted(places)[:: -(-len(places) // LABELS)] if places else []
    picture.set_xticks([point + 0.5 for point in points], [_name(places[point]) for point in points])


def _name(span: Span) -> str:
    """Return the name of a region with the end of its module's path."""
    left = LETTERS - len(span.pattern) - 1
    module = span.module
    if len(module) > left:
        module = "..." + module[3 - left :].partition(".")[2]
    return f"{span.pattern} {module}".strip() + ("" if span.looped else ", no loop")
