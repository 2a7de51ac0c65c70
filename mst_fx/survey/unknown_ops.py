"""The ops of a graph and its subgraphs that the model of memory does not know, for a report."""

from __future__ import annotations

from collections.abc import Iterator

from mst_fx.core.module_paths import module_path
from mst_fx.core.provenance import source_line
from mst_fx.core.sizes import hint
from mst_fx.predict.unknown_ops import bytes_around, unknown_in
from mst_fx.report.unknown_ops import UnknownOp, together
from mst_fx.survey.surveyed import Surveyed


def unknown_ops(surveyed: Surveyed) -> tuple[UnknownOp, ...]:
    """Return the ops that the model of memory does not know, those that are alike together, most bytes first."""
    return together(_entries(surveyed, 1))


def _entries(surveyed: Surveyed, times: int) -> Iterator[UnknownOp]:
    reader = surveyed.reader
    callers = {caller for _, callers in surveyed.children.values() for caller in callers}
    for node in reader.owner.graph.nodes:
        op = unknown_in(reader, node) if node not in callers else ""
        if op:
            yield UnknownOp(op, module_path(node), source_line(node), bytes_around(node, hint), times)
    for child, its_callers in surveyed.children.values():
        yield from _entries(child, times * len(its_callers))
