"""The ops that the model of memory does not know, and how sure a peak is with them. They are plain data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from mst_fx.core.readable import readable
from mst_fx.report.alike import alike, kind_of
from mst_fx.report.lines import at, prose, several, short, source_clipped, times

MOST = 10
"""Number of entries in a report."""
SHARE_OF_PEAK = 0.02
"""The least share of a step's peak that the text tells; the data have every entry."""
INDENT = "    "


@dataclass(frozen=True)
class UnknownOp:
    """An op whose memory is unknown, or several that are alike.

    Attributes:
        op: its name.
        module: path of the module that it belongs to; with * for numbers where several are alike.
        source: file, line and code of the op.
        bytes: that one of them reads and makes, without parameters; the peaks count these, and nothing else of it.
        count: number of ops.
    """

    op: str
    module: str
    source: str
    bytes: int
    count: int = 1

    @property
    def total(self) -> int:
        """Bytes that all of them read and make."""
        return self.bytes * self.count


def together(ops: Iterable[UnknownOp]) -> tuple[UnknownOp, ...]:
    """Return the ops with those that are alike counted together, those with most bytes first, at most MOST."""
    groups = alike(ops, lambda op: replace(kind_of(op), count=0))
    found = [replace(op, count=sum(each.count for each in group)) for op, group in groups]
    return tuple(sorted(found, key=lambda op: -op.total)[:MOST])


def how_sure(ops: tuple[UnknownOp, ...]) -> str:
    """Return how sure the peaks are, in one sentence; "" where all ops are known."""
    if not ops:
        return ""
    count, size = sum(op.count for op in ops), readable(sum(op.total for op in ops))
    largest = f"{times(ops[0].count)}{short(ops[0].op)} at {at(ops[0].module)}"
    others = f" and {several(len(ops) - 1, 'more kind')}" if len(ops) > 1 else ""
    return (
        f"the peaks count what {several(count, 'op')} read and make, {size}, and nothing that they allocate besides, "
        f"which is unknown: {largest}{others} (report.unknown_ops)"
    )


def text_of(ops: tuple[UnknownOp, ...], peak: int) -> list[str]:
    """Return the lines of a report on how sure its peaks are; none for ops with a small share of the peak."""
    if sum(op.total for op in ops) < SHARE_OF_PEAK * peak:
        return []
    source = ops[0].source if ops else ""
    return prose(how_sure(ops)) + ([INDENT + source_clipped(source, 96)] if source else [])
