"""The predicted memory of a step, with the plans and without any loop -> the timeline that a report carries."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from mst_fx.core.module_paths import module_path
from mst_fx.core.provenance import op_name
from mst_fx.core.sizes import hint
from mst_fx.plan.decisions import Plan
from mst_fx.plan.offer import Offer, held
from mst_fx.predict.segments import parameter_bytes
from mst_fx.predict.step_memory import Moment, Share, Timeline
from mst_fx.report.alike import alike, kind_of
from mst_fx.report.timeline import Alive, Course, GraphTimeline, Span, where
from mst_fx.survey.surveyed import Site, Surveyed

POINTS = 200
"""The most points that a report has of the forward, and of the backward."""
LISTED = 12
"""The most entries of what is alive at a peak; the others are one more."""


def graph_timeline(
    surveyed: Surveyed, timeline: Timeline, offers: Sequence[Offer], plans: Sequence[Plan]
) -> GraphTimeline:
    """Return what a graph holds over a step, for a report.

    Args:
        surveyed: the graph.
        timeline: of the graph.
        offers: of its regions.
        plans: the decision for each region.
    """
    sites = list(surveyed.all_sites())
    parameters = parameter_bytes(surveyed.reader, hint)
    step = _Step(timeline, sites, offers, parameters)
    looped, whole = step.course(plans), step.course([Plan(None)] * len(plans))
    count = len(timeline.segments)
    spans = tuple(
        Span(
            pattern=sites[segment.region].pattern,
            module=sites[segment.region].region.module,
            looped=plans[segment.region].lengths is not None,
            forward=_point(place, count),
            backward=min(count, POINTS) + _point(count - 1 - place, count + 1),
        )
        for place, segment in enumerate(timeline.segments)
        if segment.region is not None
    )
    return GraphTimeline(parameters, timeline.resident - parameters, min(count, POINTS), looped, whole, spans)


def _point(place: int, count: int) -> int:
    """Return the point that stands for one of `count` moments."""
    return place if count <= POINTS else place * POINTS // count


def _fewer(moments: Sequence[Moment]) -> list[Moment]:
    """Return the moments that hold most, one for each point."""
    most: dict[int, Moment] = {}
    for place, moment in enumerate(moments):
        point = _point(place, len(moments))
        most[point] = max(most.get(point, moment), moment, key=sum)
    return list(most.values())


@dataclass(frozen=True)
class _Step:
    """A training step of one graph.

    Attributes:
        timeline: of the graph.
        sites: its regions.
        offers: what the planner knows of them.
        parameters: bytes of the graph's parameters.
    """

    timeline: Timeline
    sites: Sequence[Site]
    offers: Sequence[Offer]
    parameters: int

    def course(self, plans: Sequence[Plan]) -> Course:
        """Return the bytes over the step with these plans."""
        regions = [held(offer, plan.lengths) for offer, plan in zip(self.offers, plans, strict=True)]
        forward, backward = self.timeline.moments(regions)
        moments = [*forward, *backward]
        peak = max(range(len(moments)), key=lambda place: sum(moments[place]))
        count, moment, is_backward = len(forward), moments[peak], peak >= len(forward)
        number = peak if not is_backward else 2 * count - 1 - peak  # -1 at the end of the step
        found = [*self._fixed(moment), *self._running(plans, number, moment, backward=is_backward)]
        if number >= 0:
            shares = self.timeline.shares(regions, number, backward=is_backward)
            found += [alive for share in shares for alive in self._saved(share)]
        outputs, saved, gradients, running = zip(*_fewer(forward), *_fewer(backward), strict=True)
        at = self._place(number, backward=is_backward)
        return Course(outputs, gradients, saved, running, at, _together(found))

    def _fixed(self, moment: Moment) -> Iterator[Alive]:
        """Yield what is alive whatever runs."""
        yield Alive("parameters", "", "", self.parameters)
        yield Alive("inputs", "", "", self.timeline.resident - self.parameters)
        yield Alive("outputs", "", "", moment.outputs)
        yield Alive("gradients", "", "", moment.gradients)

    def _running(self, plans: Sequence[Plan], number: int, moment: Moment, *, backward: bool) -> Iterator[Alive]:
        """Yield what the segment that runs needs itself; of a loop, its parts."""
        what, module = self._name(number)
        region = self.timeline.segments[number].region if number >= 0 else None
        lengths = plans[region].lengths if region is not None else None
        left = moment.running
        if region is not None and lengths is not None:
            memory = self.offers[region].memory
            loop = memory.backward if backward else memory.forward
            if loop is not None:
                yield Alive("running", f"results of the loop of {what}", module, loop.results)
                yield Alive("running", f"sums of gradients of the loop of {what}", module, loop.sums)
                left -= loop.results + loop.sums
                what = f"a chunk of {what}"
        yield Alive("running", what, module, left)

    def _saved(self, share: Share) -> Iterator[Alive]:
        """Yield what one segment has saved."""
        segment = self.timeline.segments[share.segment]
        yield Alive("saved", "what checkpointed blocks read", "", share.entry)
        for node, size in segment.values if share.whole else ():
            yield Alive("saved", op_name(node), module_path(node), size)
        yield Alive("saved", *self._name(share.segment), share.region)

    def _name(self, number: int) -> tuple[str, str]:
        """Return the pattern, or the op, of a segment, and its module."""
        segment = self.timeline.segments[number] if number >= 0 else None
        if segment is not None and segment.region is not None:
            site = self.sites[segment.region]
            return site.pattern, site.region.module
        node = segment.widest if segment is not None else None
        return (op_name(node), module_path(node)) if node is not None else ("", "")

    def _place(self, number: int, *, backward: bool) -> str:
        if number < 0:
            return "the end of the step"
        return where("backward" if backward else "forward", *self._name(number))


def _together(found: Sequence[Alive]) -> tuple[Alive, ...]:
    """Return what is alive, the largest first, with what is alike together and what is small in one entry."""
    groups = alike((alive for alive in found if alive.bytes > 0), lambda alive: kind_of(replace(alive, bytes=0)))
    sums = [
        Alive(alive.kind, alive.what, alive.module, sum(each.bytes for each in group), len(group))
        for alive, group in groups
    ]
    sums.sort(key=lambda alive: -alive.bytes)
    others = sums[LISTED:]
    rest = [Alive("other", "", "", sum(alive.bytes for alive in others), len(others))] if others else []
    return (*sums[:LISTED], *rest)
