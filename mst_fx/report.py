"""What was looped, what was not, and why: plain data underneath, text by `str()`."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from mst_fx.plan import Plan
from mst_fx.provenance import module_path, op_name, source_line
from mst_fx.refusal import Refusal
from mst_fx.region import Region
from mst_fx.stages import Stages


@dataclass(frozen=True)
class LoopedRegion:
    """A region that runs as a loop.

    Attributes:
        pattern: name of the pattern that recognised it.
        module: path of the module that it belongs to.
        source: file, line and code of its last op.
        axis: the split dim of the stream, and its length in positions.
        chunks: number of mini-sequences.
        bytes_before, bytes_after: of the region's temporaries, unlooped and with one mini-sequence alive.
        backward: "recompute", "in_forward" or "none".
    """

    pattern: str
    module: str
    source: str
    axis: str
    chunks: int
    bytes_before: int
    bytes_after: int
    backward: str

    def __str__(self) -> str:
        return (
            f"{self.pattern} at {self.module or 'the top'}: {self.axis} in {self.chunks} chunks, "
            f"{_readable(self.bytes_before)} -> {_readable(self.bytes_after)} of temporaries, "
            f"backward {self.backward.replace('_', ' ')}\n    {self.source}"
        )


@dataclass(frozen=True)
class RefusedRegion:
    """A region, or what looked like one, that was left as it was.

    Attributes:
        pattern: name of the pattern that recognised it.
        reason: name of a `Reason`.
        op: what stands in the way.
        source: file, line and code of that op.
        advice: what to change.
        text: the reason in one sentence.
        module: path of the module that the op belongs to.
    """

    pattern: str
    reason: str
    op: str
    source: str
    advice: str
    text: str
    module: str

    def __str__(self) -> str:
        where = self.module or "the top"
        return (
            f"{self.pattern} at {where} left alone ({self.reason}): {self.text}\n    {self.source}\n    {self.advice}"
        )


@dataclass(frozen=True)
class Report:
    """The decisions of one compile, in graph order.

    Attributes:
        regions: what is looped.
        refusals: what is not, and why.
        graphs: number of graphs that were seen; more than one after a graph break.
    """

    regions: tuple[LoopedRegion, ...] = ()
    refusals: tuple[RefusedRegion, ...] = ()
    graphs: int = 1

    def __add__(self, other: Report) -> Report:
        return Report(self.regions + other.regions, self.refusals + other.refusals, self.graphs + other.graphs)

    def __str__(self) -> str:
        if not self.regions and not self.refusals:
            return f"mst_fx: nothing to loop in {self.graphs} graph(s): no pattern matched"
        head = f"mst_fx: {len(self.regions)} looped, {len(self.refusals)} left alone, {self.graphs} graph(s)"
        return "\n".join([head, *map(str, self.regions), *map(str, self.refusals)])


def looped(pattern: str, region: Region, stages: Stages, plan: Plan) -> LoopedRegion:
    """The entry of a region that was rewritten."""
    return LoopedRegion(
        pattern=pattern,
        module=module_path(region.sink),
        source=source_line(region.sink),
        axis=f"dim {stages.axis.dim} ({stages.length} positions)",
        chunks=plan.chunks,
        bytes_before=plan.bytes_before,
        bytes_after=plan.bytes_after,
        backward=plan.backward,
    )


def refused(pattern: str, refusal: Refusal) -> RefusedRegion:
    """The entry of a region that was not."""
    node = refusal.node
    return RefusedRegion(
        pattern=pattern,
        reason=refusal.reason.name,
        op=op_name(node) if node is not None else "",
        source=source_line(node) if node is not None else "",
        advice=refusal.reason.value,
        text=refusal.text,
        module=module_path(node) if node is not None else "",
    )


def _readable(count: int) -> str:
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"


_MADE: deque[Report] = deque(maxlen=1000)


def record(report: Report) -> None:
    """Keep the report of a compile for `reports`."""
    _MADE.append(report)


def reports() -> list[Report]:
    """The reports of the compiles made in this process (the last thousand), oldest first; one a graph."""
    return list(_MADE)
