"""Decisions of the stages -> the entries of a report."""

from __future__ import annotations

from collections.abc import Sequence

from torch.fx import Node

from mst_fx.bodies.work import Work
from mst_fx.core.provenance import source_line
from mst_fx.core.values import bytes_of, fake_value
from mst_fx.plan.decisions import Plan
from mst_fx.recognise.early_cut import CutHead
from mst_fx.recognise.region import Region, needs_gradient
from mst_fx.report.items import Dropped, EarlyCut, LoopedRegion


def looped(pattern: str, region: Region, work: Work, plan: Plan, detached: Sequence[Node]) -> LoopedRegion:
    """Return the entry of a looped region.

    Args:
        pattern: name of the pattern that recognised it.
        region: the region.
        work: the work of its loop.
        plan: the planner's decision.
        detached: returned values that get no gradient.
    """
    return LoopedRegion(
        pattern=pattern,
        module=region.module,
        source=source_line(region.last),
        axis=_axis(region, work),
        chunks=plan.chunks,
        bytes_before=plan.bytes_before,
        bytes_after=plan.bytes_after,
        backward=work.backward,
        added_ms=plan.added_ms,
        note=plan.note,
        returned_bytes=sum(map(_bytes, region.returned)),
        returned_gradient_bytes=sum(
            _bytes(node) for node in region.returned if needs_gradient(node, region.nodes) and node not in detached
        ),
    )


def _axis(region: Region, work: Work) -> str:
    if region.over == "heads":
        return f"heads ({work.stages.length} of the keys)"
    return f"dim {work.stages.axis.dim} ({work.stages.length} positions)"


def _bytes(node: Node) -> int:
    return bytes_of(fake_value(node))


def cut_head(head: CutHead) -> EarlyCut:
    """Return the entry of a head that projects only the tokens that are read."""
    return EarlyCut(head.region.module, source_line(head.region.last), head.bytes_before, head.bytes_after)


def dropped(region: Region, node: Node) -> Dropped:
    """Return the entry of logits of a region that are not returned."""
    return Dropped(region.module, source_line(node), _bytes(node))
