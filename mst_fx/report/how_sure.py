"""How sure the peaks are: what they leave out."""

from __future__ import annotations

from mst_fx.core.readable import readable
from mst_fx.report.lines import at, prose, several, short, source_clipped, times
from mst_fx.report.unknown_ops import UnknownOp

SHARE_OF_PEAK = 0.02
"""The least share of a step's peak that the text tells of unknown ops; the data have every one."""
INDENT = "    "


def how_sure(ops: tuple[UnknownOp, ...], side_by_side: int) -> str:
    """Return how sure the peaks are, in one sentence; "" where nothing is known that they leave out.

    Args:
        ops: that the model of memory does not know.
        side_by_side: number of checkpointed blocks that nothing puts in turn.
    """
    return "; ".join(filter(None, (_of_ops(ops), _of_blocks(side_by_side))))


def _of_ops(ops: tuple[UnknownOp, ...]) -> str:
    if not ops:
        return ""
    count, size = sum(op.count for op in ops), readable(sum(op.total for op in ops))
    largest = f"{times(ops[0].count)}{short(ops[0].op)} at {at(ops[0].module)}"
    others = f" and {several(len(ops) - 1, 'more kind')}" if len(ops) > 1 else ""
    return (
        f"the peaks count what {several(count, 'op')} read and make, {size}, and nothing that they allocate besides, "
        f"which is unknown: {largest}{others} (report.unknown_ops)"
    )


def _of_blocks(count: int) -> str:
    if not count:
        return ""
    return (
        f"{count} checkpointed blocks read the same activation, and nothing but their gradients puts them in turn: a "
        "compiler may recompute more of them at once than the peaks count, above all where they are not looped"
    )


def text_of(ops: tuple[UnknownOp, ...], side_by_side: int, peak: int) -> list[str]:
    """Return the lines of a report on how sure its peaks are; none for ops with a small share of the peak."""
    if sum(op.total for op in ops) < SHARE_OF_PEAK * peak:
        ops = ()
    lines = prose(how_sure(ops, side_by_side)) if ops or side_by_side else []
    source = ops[0].source if ops else ""
    return lines + ([INDENT + source_clipped(source, 96)] if source else [])
