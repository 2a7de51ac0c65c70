"""The report: what is looped, what is not, and why. It is plain data, and `str()` gives its text."""

from __future__ import annotations

import json
from collections import deque
from dataclasses import dataclass, replace
from os import PathLike
from typing import Any

from mst_fx.core.torch_private.captured import Attempt, attempt
from mst_fx.core.torch_private.dynamo import given_up, reason_to_give_up
from mst_fx.report.first import first_of
from mst_fx.report.how_sure import how_sure
from mst_fx.report.items import Dropped, EarlyCut, LoopedRegion, Offloaded, RefusedRegion
from mst_fx.report.plain import plain
from mst_fx.report.text import text_of
from mst_fx.report.timeline import GraphTimeline
from mst_fx.report.unknown_ops import UnknownOp, together
from mst_fx.report.unlooped import Unlooped, joined, largest


@dataclass(frozen=True)
class Report:
    """The decisions of one compile, in graph order.

    Attributes:
        regions: the regions that are looped.
        refusals: what is not looped, and why.
        cuts: projections that make less than the program says.
        dropped: logits that are not returned.
        offloaded: values that are on the host from forward to backward.
        graphs: number of graphs in the report; more than one after a graph break.
        peak, peak_whole: predicted peak bytes of a training step, with these loops and without any; the largest of
            several graphs.
        unlooped: the largest values that no loop covers, and why (see `Unlooped`).
        notes: what else the user should know.
        budget: bytes that the option `memory_budget` allows, None without it.
        timelines: what each graph holds over a step (see `GraphTimeline`), in the order of the compiles.
        unknown_ops: ops of which the peaks count operands and results alone (see `UnknownOp`).
        side_by_side: number of checkpointed blocks that nothing puts in turn (see `survey/side_by_side.py`).
    """

    regions: tuple[LoopedRegion, ...] = ()
    refusals: tuple[RefusedRegion, ...] = ()
    cuts: tuple[EarlyCut, ...] = ()
    dropped: tuple[Dropped, ...] = ()
    graphs: int = 1
    peak: int = 0
    peak_whole: int = 0
    unlooped: tuple[Unlooped, ...] = ()
    notes: tuple[str, ...] = ()
    budget: int | None = None
    timelines: tuple[GraphTimeline, ...] = ()
    offloaded: tuple[Offloaded, ...] = ()
    unknown_ops: tuple[UnknownOp, ...] = ()
    side_by_side: int = 0

    def __add__(self, other: Report) -> Report:
        peak, whole = max(self.peak, other.peak), max(self.peak_whole, other.peak_whole)
        report = replace(self.joined(other), graphs=self.graphs + other.graphs, peak=peak, peak_whole=whole)
        return replace(report, unlooped=tuple(largest(report.unlooped, peak)))

    def joined(self, other: Report) -> Report:
        """Return the report with the decisions about another part of the same graph added."""
        regions, refusals = self.regions + other.regions, self.refusals + other.refusals
        cuts, gone = self.cuts + other.cuts, self.dropped + other.dropped
        left, notes = joined(self.unlooped, other.unlooped), (*dict.fromkeys(self.notes + other.notes),)
        return Report(
            regions,
            refusals,
            cuts,
            gone,
            self.graphs,
            unlooped=left,
            notes=notes,
            budget=other.budget if self.budget is None else self.budget,
            timelines=self.timelines + other.timelines,
            offloaded=self.offloaded + other.offloaded,
            unknown_ops=together(self.unknown_ops + other.unknown_ops),
            side_by_side=self.side_by_side + other.side_by_side,
        )

    @property
    def change_first(self) -> str:
        """The most valuable advice, in one sentence; "" where there is none."""
        return first_of(self.regions, self.refusals, self.unlooped)

    @property
    def how_sure(self) -> str:
        """What the peaks leave out, in one sentence; "" where nothing is known that they do."""
        return how_sure(self.unknown_ops, self.side_by_side)

    def __str__(self) -> str:
        return text_of(self)

    def _repr_html_(self) -> str:
        """Return the report as a table, for notebooks."""
        from mst_fx.report.html import html_of

        return html_of(self)

    def to_dict(self) -> dict[str, Any]:
        """Return the report as dicts, lists, strings, numbers and None.

        The keys are the attributes of the report, and inside of it those of `LoopedRegion`, `RefusedRegion`,
        `EarlyCut`, `Dropped`, `Offloaded`, `Unlooped`, `GraphTimeline`, `Course`, `Alive`, `Span` and `UnknownOp`;
        besides, "format" is 1 until a key goes or changes its meaning, and "change_first" and "how_sure" are the
        properties. Bytes are ints.
        """
        return {"format": FORMAT, **plain(self), "change_first": self.change_first, "how_sure": self.how_sure}

    def to_json(self, *, indent: int | None = None) -> str:
        """Return `to_dict` as JSON.

        Args:
            indent: as in `json.dumps`.
        """
        return json.dumps(self.to_dict(), indent=indent)

    def plot(self, path: str | PathLike[str]) -> None:
        """Draw the memory of a training step as predicted, without and with loops, to a file.

        Args:
            path: of the picture; its ending says the format (.png, .svg, .pdf).

        Raises:
            ImportError: matplotlib is not installed (the extra `plot`).
            ValueError: the report has no graph.
        """
        from mst_fx.report.plot import draw

        draw(self, path)


FORMAT = 1
"""The version of `Report.to_dict`: it grows when a key goes or changes its meaning, not when one is added."""
UNUSED = (
    "nothing was compiled with mst_fx yet: call enable() before the first step, and set the trainer's flag for "
    "torch.compile; or compile with backend='mst_fx'"
)
_MADE: deque[tuple[Report, Attempt | None]] = deque(maxlen=1000)


def record(report: Report) -> None:
    """Store the report of a compile for `reports`, in place of what it has stored before Dynamo began it anew."""
    now = attempt()
    while now is not None and _MADE and now.replaces(_MADE[-1][1]):
        _MADE.pop()
    _MADE.append((report, now))


def summary() -> Report:
    """Return one report over the compiles of this process (the last thousand), as a trainer makes several graphs.

    Its notes tell which functions Dynamo has left to eager execution, and why.
    """
    made, notes = reports(), tuple(dict.fromkeys(map(reason_to_give_up, given_up())))
    if not made:
        return Report(graphs=0, notes=notes or (UNUSED,))
    report = sum(made[1:], made[0])
    return replace(report, notes=report.notes + notes)


def reports() -> list[Report]:
    """Return the reports of this process's compiles (the last thousand), oldest first, one for each graph."""
    return [report for report, _ in _MADE]
