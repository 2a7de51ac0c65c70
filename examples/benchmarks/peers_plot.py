"""The plot of `peers.py`: time and peak by length, a line a method, a column a piece of work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from peers_methods import REFERENCE
from peers_work import WORK
from turns import Row


def plot(rows: Sequence[Row], path: str) -> None:
    works = list(dict.fromkeys(row.work for row in rows))
    methods = list(dict.fromkeys(row.method for row in rows))
    figure = Figure(figsize=(4.2 * len(works), 6.5), dpi=160, layout="constrained")
    panels = figure.subplots(2, len(works), squeeze=False)
    for column, work in enumerate(works):
        for number, method in enumerate(methods):
            mine = [row for row in rows if (row.work, row.method) == (work, method) and not row.error]
            draw(panels[:, column], mine, references(rows, work), method, f"C{number}")
        panels[0, column].set_title(WORK[work].title.split(", ")[0] + f" ({work})", fontsize=9)
    for axes, name in zip(panels[:, 0], ("time, to the reference", "peak GiB above the inputs"), strict=True):
        axes.set_ylabel(name, fontsize=8.5)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, fontsize=8, frameon=False)
    figure.supxlabel("tokens", fontsize=9)
    figure.savefig(path)


def references(rows: Sequence[Row], work: str) -> dict[int, float]:
    """Milliseconds of the reference by length."""
    name = REFERENCE[WORK[work].kind]
    return {row.tokens: row.ms for row in rows if (row.work, row.method) == (work, name) and not row.error}


def draw(panels: Sequence[Any], rows: Sequence[Row], base: dict[int, float], method: str, colour: str) -> None:
    style = {"color": colour, "marker": "o", "markersize": 3.5, "linewidth": 2 if method.startswith("mst_fx") else 1}
    known = [row for row in rows if row.tokens in base]
    panels[0].plot([row.tokens for row in known], [row.ms / base[row.tokens] for row in known], label=method, **style)
    panels[1].plot([row.tokens for row in rows], [row.peak_gib for row in rows], **style)
    panels[1].set_yscale("log")
    for axes in panels:
        axes.set_xscale("log", base=2)
        axes.grid(color="#eeeeee")
        axes.tick_params(labelsize=7.5)
