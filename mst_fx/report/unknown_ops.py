"""The ops that the model of memory does not know. They are plain data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from mst_fx.report.alike import alike, kind_of

MOST = 10
"""Number of entries in a report."""


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
