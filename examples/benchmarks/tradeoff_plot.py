"""The plot of `tradeoff.py`: time against peak memory, a panel a length."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, ScalarFormatter
from tradeoff_rows import Row, lengths_of, named

LOOKS = {  # marker and colour
    "plain": ("o", "#555555"),
    "checkpointing": ("s", "#d55e00"),
    "mst_fx": ("D", "#0072b2"),
    "both": ("^", "#009e73"),
}
STAR = {"marker": "*", "markersize": 12, "markeredgecolor": "black", "markeredgewidth": 0.6}
PANELS = 6


def plot(rows: Sequence[Row], path: str) -> None:
    """One panel a length; at most PANELS, from the shortest to the longest."""
    lengths = lengths_of([row for row in rows if not row.error])
    count = min(PANELS, len(lengths))
    columns, lines = min(3, count), -(-count // 3)
    figure = Figure(figsize=(9, 1 + 2.5 * lines), dpi=200, layout="constrained")
    panels = figure.subplots(lines, columns, squeeze=False).flatten()
    for axes in panels[count:]:
        axes.set_axis_off()
    for i, axes in enumerate(panels[:count]):
        tokens = lengths[round(i * (len(lengths) - 1) / max(1, count - 1))]
        draw(axes, [row for row in rows if row.tokens == tokens])
    scale(panels[:count])
    handles = [Line2D([], [], marker=m, color=c, linewidth=0, label=name) for name, (m, c) in LOOKS.items()]
    handles.append(Line2D([], [], linewidth=0, label="the planner's own choice", **{**STAR, "color": "white"}))
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), fontsize=8.5, frameon=False)
    figure.supxlabel("peak GiB of a step above the weights (small numbers: chunk length in tokens)", fontsize=9)
    figure.supylabel("ms per 1,000 tokens", fontsize=9)
    figure.savefig(path)


def draw(axes: Any, rows: Sequence[Row]) -> None:
    """Chunk lengths of one method on a line, the planner's own as a star; what has no numbers is named."""
    for method, (marker, colour) in LOOKS.items():
        mine = [row for row in rows if row.method == method and not row.error]
        points = {row.chunk: (row.peak_gib, row.ms / row.tokens * 1000) for row in mine}
        if method in ("mst_fx", "both") and None in points:
            axes.plot(*points.pop(None), linewidth=0, color=colour, **STAR)
        axes.plot(*zip(*points.values(), strict=True), marker=marker, color=colour, linewidth=0.8, markersize=5)
        for chunk, point in points.items():
            text = f"{chunk:,}" if chunk else ""
            axes.annotate(text, point, xytext=(4, 3), textcoords="offset points", fontsize=6.5, color=colour)
    missing = "\n".join(f"{named(row)}: {row.error[:30]}" for row in rows if row.error)
    axes.text(0.03, 0.03, missing, transform=axes.transAxes, fontsize=6.5, color="#555555")
    axes.set_title(f"{rows[0].tokens:,} tokens", fontsize=9)
    axes.grid(color="#eeeeee")
    axes.tick_params(labelsize=7.5)


def scale(panels: Sequence[Any]) -> None:
    """Logarithmic axes on which a ratio is the same distance in every panel, so that none of them magnifies noise."""
    for name in "xy":
        ends = [getattr(axes.dataLim, f"interval{name}").tolist() for axes in panels]
        half = 1.15 * sqrt(max(1.2, *(high / low for low, high in ends)))
        for axes, (low, high) in zip(panels, ends, strict=True):
            middle = sqrt(low * high)
            axes.set(**{f"{name}scale": "log", f"{name}lim": (middle / half, middle * half)})
            axis = getattr(axes, f"{name}axis")
            axis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7)) if half > 2 else MaxNLocator(5))
            axis.set_minor_locator(NullLocator())
            axis.set_major_formatter(ScalarFormatter())
