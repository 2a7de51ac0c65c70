"""One captured graph -> the same graph with loops: survey, plan, bodies, rewrite (see `pipeline`).

An error in one region costs only the loop of this region: it is left out, and the pass decides everything anew.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Container, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch.fx import GraphModule, Node

from mst_fx.bodies.call import Call
from mst_fx.bodies.splice import Replacement, loop
from mst_fx.bodies.work import Work, fix_for
from mst_fx.capture.layouts_on_meta import settle_layouts
from mst_fx.core.clean_room import clean_room
from mst_fx.core.config import Config
from mst_fx.core.faults import refusal_for
from mst_fx.core.modes import Mode
from mst_fx.core.module_paths import knowing, landmarks_of
from mst_fx.core.provenance import borders_of
from mst_fx.core.readable import readable
from mst_fx.core.refusal import Reason, Refusal
from mst_fx.core.sizes import Hint, fix, hint, is_symbolic, long_hint, without_guards
from mst_fx.core.values import marked_sizes, sizes_of
from mst_fx.plan.decisions import Plan, Plans
from mst_fx.plan.lengths import Lengths
from mst_fx.plan.offer import Offer
from mst_fx.plan.planner import make_plans
from mst_fx.predict.step_memory import Timeline
from mst_fx.recognise.local_shards import ON_SHARDS
from mst_fx.recognise.pattern import Pattern
from mst_fx.recognise.rebuild import Edit, rebuilt
from mst_fx.report.entries import looped
from mst_fx.report.items import refused
from mst_fx.report.report import Report
from mst_fx.runtime.offload import Offload
from mst_fx.runtime.places import Place, remember
from mst_fx.survey import messages
from mst_fx.survey.courses import graph_timeline
from mst_fx.survey.kept import kept_by_blocks
from mst_fx.survey.offloading import away_of, offload_of, told
from mst_fx.survey.survey import Surveyor
from mst_fx.survey.surveyed import Around, Site, Surveyed, about_shapes, device_of_graph, timeline_of
from mst_fx.survey.unknown_ops import unknown_ops
from mst_fx.survey.unlooped import unlooped
from mst_fx.survey.wishes import left_out, unmatched, within_breaks

if TYPE_CHECKING:
    from mst_fx.verify.verify import Verified

log = logging.getLogger("mst_fx")
T = TypeVar("T")


@dataclass(frozen=True)
class Rewritten:
    """A graph with loops.

    Attributes:
        module: the new graph; the captured one where nothing changes.
        report: the decisions.
        sites: the regions that are looped.
        offload: what goes to the host.
    """

    module: GraphModule
    report: Report
    sites: tuple[Site, ...]
    offload: Offload | None = None

    @property
    def works(self) -> list[Work]:
        """The works of the loops; regions that are alike share one."""
        return list(dict.fromkeys(site.work for site in self.sites))


class Engine:
    """The pass over one graph.

    Args:
        gm: the captured graph; the pass does not change it.
        config: the user's options.
        chosen: the patterns that recognise regions.
        on_shards: whether ops on DTensors may run on shards.
    """

    def __init__(self, gm: GraphModule, config: Config, chosen: Sequence[Pattern], *, on_shards: bool = True) -> None:
        self.gm, self.landmarks = gm, landmarks_of(gm)
        with _quiet_room():
            settle_layouts(gm)
        self.config, self._told = within_breaks(config, gm)
        self.surveyor = Surveyor(self.config, chosen, marked_sizes(gm), set() if on_shards else {ON_SHARDS})
        self.surveyed = self._surveyed()

    def _surveyed(self) -> Surveyed:
        mode = Mode(grad=torch.is_grad_enabled(), inference=torch.is_inference_mode_enabled())
        around = Around(mode=mode, borders=borders_of(self.gm))
        with self._room(), without_guards(sizes_of(self.gm) if self.config.strict else ()):
            surveyed = self.surveyor.survey(self.gm, around)
            notes = (*self._told, *left_out(self.config), *unmatched(self.config, surveyed), *about_shapes(surveyed))
        return replace(surveyed, report=surveyed.report.joined(Report(notes=notes)))

    def copy(self) -> GraphModule:
        """Return a copy of the captured graph: compilers change the graph that they get."""
        return rebuilt(self.gm, [])

    @contextmanager
    def _room(self) -> Iterator[None]:
        """Enter a quiet room where the paths of the user's modules are known."""
        with knowing(self.landmarks), _quiet_room():
            yield

    def rewritten(self, without: Mapping[Work, str] | None = None) -> Rewritten:
        """Return the graph with loops.

        Args:
            without: works whose regions are not looped, each with the reason.
        """
        while True:
            try:
                return self._rewritten_but(without or {})
            except _LeftOverError as left:
                messages.tell_left_over(left)
                self.surveyor.left_alone.update(left.changes)
                before, self.surveyed = self.surveyed, self._surveyed()
                self.surveyed = self.surveyed.with_shards_of(before)

    def _rewritten_but(self, reasons: Mapping[Work, str]) -> Rewritten:
        sites = [site for site in self.surveyed.all_sites() if site.work in reasons]
        left = {site: Refusal(Reason.INTERNAL, site.region.last, reasons[site.work]) for site in sites}
        with self._room():
            surveyed = self.surveyed.without(left)
            while True:
                try:
                    return self._rewritten(surveyed)
                except _AtFaultError as fault:
                    messages.tell_left_out(fault.site, fault)
                    surveyed = surveyed.without({fault.site: fault.refusal})

    def _rewritten(self, surveyed: Surveyed) -> Rewritten:
        offers = self._offers(surveyed, due=self._due(surveyed))
        kept = kept_by_blocks(surveyed, self.config.least_sent) if self._may_offload() else []
        timeline = timeline_of(surveyed, away=away_of(kept))
        plans = make_plans(offers, timeline, device_of_graph(surveyed), self.config)
        of_site = dict(zip(surveyed.all_sites(), plans.of, strict=True))
        messages.tell_plans(plans, of_site)
        unneeded = surveyed.left_over([site for site, plan in of_site.items() if plan.lengths])
        if unneeded:
            raise _LeftOverError(unneeded)
        module, report = self._spliced(surveyed, of_site)
        report = _with_budget(report, plans).joined(self._unlooped(surveyed, of_site, plans.peak))
        report = report.joined(self._timeline(surveyed, timeline, offers, plans))
        report = report.joined(self._unknown(surveyed))
        report = report.joined(Report(notes=(plans.leaner,) if plans.leaner else ()))
        report = report.joined(told(kept, plans, self.config) if self._may_offload() else Report())
        report = replace(report, peak=plans.peak, peak_whole=plans.peak_whole, budget=plans.budget)
        report = replace(report, side_by_side=timeline.side_by_side)
        offload = offload_of(surveyed, plans, of_site, self._literals, self.config)
        looping = tuple(site for site, plan in of_site.items() if plan.lengths)
        return Rewritten(module or self.gm, report, looping, offload)

    def _may_offload(self) -> bool:
        return self.config.offload is not None and torch.is_grad_enabled()

    def _literals(self, site: Site, plan: Plan) -> Any:
        assert plan.lengths is not None
        return self.surveyor.call(site.work, plan.lengths).spec.backward_spec

    def _unlooped(self, surveyed: Surveyed, plans: Mapping[Site, Plan], peak: int) -> Report:
        """Return a report with the largest values that no loop covers."""
        told = partial(unlooped, surveyed, plans, peak, self.config.least_bytes)
        return self._part("values that no loop covers", lambda: Report(unlooped=told()))

    def _unknown(self, surveyed: Surveyed) -> Report:
        """Return a report with the ops that the model of memory does not know."""
        return self._part("ops that are unknown", lambda: Report(unknown_ops=unknown_ops(surveyed)))

    def _timeline(self, surveyed: Surveyed, timeline: Timeline, offers: Sequence[Offer], plans: Plans) -> Report:
        """Return a report with what the graph holds over a step."""
        told = partial(graph_timeline, surveyed, timeline, offers, plans.of)
        return self._part("the timeline of a step", lambda: Report(timelines=(told(),)))

    def _part(self, what: str, report: Callable[[], Report]) -> Report:
        """Return a part of the report, or one of the error in making it: that costs no loop."""
        try:
            return report()
        except Exception as error:
            return Report(refusals=(refused("all", refusal_for(error, None, what, strict=self.config.strict)),))

    def _offers(self, surveyed: Surveyed, at: Hint = hint, due: Container[Site] = ()) -> list[Offer]:
        """Return what the planner has to know of each region of a graph, at the sizes that `at` tells."""
        sites = surveyed.all_sites()
        return [self._for(site, partial(self.surveyor.offer, site, at, due=site in due)) for site in sites]

    def _due(self, surveyed: Surveyed) -> set[Site]:
        """Return the sites to loop because their length may grow, even if the captured one is short.

        Their loops recompute nothing, so they cost a short sequence nothing: it is one chunk. A loop that recomputes
        would slow down a short sequence, so its plan depends on the captured length.
        """
        varying = {site for site in surveyed.all_sites() if site.work.stages.dynamic and not site.recomputes}
        if not varying or self.config.min_bytes is not None:
            return set()
        offers, timeline = self._offers(surveyed, long_hint), timeline_of(surveyed, long_hint)
        plans = make_plans(offers, timeline, device_of_graph(surveyed), self.config)
        return {site for site, plan in zip(surveyed.all_sites(), plans.of, strict=True) if plan.lengths} & varying

    def _spliced(self, surveyed: Surveyed, plans: Mapping[Site, Plan]) -> tuple[GraphModule | None, Report]:
        """Return the graph with loops, None where it needs no change, and the report on it and its subgraphs."""
        report, edits = surveyed.report, []
        for site in surveyed.sites:
            plan = plans[site]
            if plan.lengths is None:
                refusal = Refusal(Reason.SMALL, site.region.last, plan.reason, plan.advice)
                refusals = (refused(site.pattern, refusal, site.region.module),)
                report = report.joined(Report(refusals=refusals))
                continue
            detached = site.region.returned if self.config.returned_logits == "detach" else ()
            edits.append(Edit(site.region, partial(self._put, site, plan), detached))
            entry = looped(site.pattern, site.region, site.work, plan, detached)
            verified = self._verified(site, plan.lengths)
            if verified is not None:
                entry = replace(entry, verified=verified.holds, verification=verified.text)
            report = report.joined(Report(regions=(entry,)))
        children: dict[str, GraphModule] = {}
        for name, (child, _) in surveyed.children.items():
            new_child, inner_report = self._spliced(child, plans)
            report = report.joined(inner_report)
            children.update({name: new_child} if new_child is not None else {})
        if surveyed.sizes and not (edits or children or report.dropped):
            return None, replace(report, cuts=())  # an early cut that fixes a size pays only with a loop
        for size in surveyed.sizes:
            fix(size)
        changed = edits or children or surveyed.report.cuts or surveyed.report.dropped
        return rebuilt(surveyed.reader.owner, edits, children) if changed else None, report

    def _verified(self, site: Site, lengths: Lengths) -> Verified | None:
        """Return what running the loop of a region has shown, None without the option `verify`.

        Raises:
            _AtFaultError: the loop is wrong, and has to be left out.
        """
        verified = self._for(site, partial(self.surveyor.verified, site, lengths))
        if isinstance(verified, Refusal):
            raise _AtFaultError(site, verified)
        return verified

    def _put(self, site: Site, plan: Plan, owner: GraphModule, place: Node, node_of: Mapping[Node, Node]) -> list[Node]:
        """Put the loop into the graph, as an `Edit` does, and fix the numbers that it needs fixed, not before."""
        assert plan.lengths is not None
        lengths = plan.lengths

        def put() -> list[Node]:
            call = self.surveyor.call(site.work, lengths)
            fix_for(site.region, site.work)
            replacement = Replacement(site.region, site.work.stages, call, site.around.saves_results)
            remember(_place(site, call), call.spec.forward_spec, call.spec.backward_spec)
            results = loop(owner, place, node_of, replacement)
            messages.tell_spliced(site)
            return results

        return self._for(site, put)

    def _for(self, site: Site, do: Callable[[], T]) -> T:
        """Do something for one region, and return its value.

        Raises:
            _AtFaultError: it raised an error.
        """
        try:
            return do()
        except Exception as error:
            doing = f"{site.pattern} at {site.region.name}"
            raise _AtFaultError(site, refusal_for(error, site.region.last, doing, strict=self.config.strict)) from error


class _AtFaultError(Exception):
    """An error in one region: the region has to be left out."""

    def __init__(self, site: Site, refusal: Refusal) -> None:
        super().__init__(refusal.text)
        self.site = site
        self.refusal = refusal


class _LeftOverError(Exception):
    """The loops do not need some changes of the graph: it has to be surveyed without these."""

    def __init__(self, changes: set[Hashable]) -> None:
        super().__init__(f"{len(changes)} changes are left over")
        self.changes = changes


@contextmanager
def _quiet_room() -> Iterator[None]:
    """Enter the clean room, without garbage collection: in a large program, one takes as long as the pass."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        with clean_room():
            yield
    finally:
        if enabled:
            gc.enable()


def _place(site: Site, call: Call) -> Place:
    """Return what errors at run time say of a region."""
    operands = [node.meta["val"] for node in site.work.stages.operands]
    axes = (call.spec.backward_spec or call.spec.forward_spec)[2][-len(operands) :]
    whole = (tuple(x.shape) for x, axis in zip(operands, axes, strict=True) if axis is None)
    weights = frozenset(shape for shape in whole if not any(map(is_symbolic, shape)))
    return Place(site.pattern, site.region.module, weights)


def _with_budget(report: Report, plans: Plans) -> Report:
    """Return the report, with a refusal where no plan keeps to the budget; it is logged as a warning, too."""
    if plans.budget is None or plans.peak <= plans.budget:
        return report
    text = f"{readable(plans.budget)} allowed, the least is {readable(plans.peak)} (predicted)"
    log.warning("mst_fx: memory_budget missed: %s; what would help: %s", text, plans.advice)
    return report.joined(Report(refusals=(refused("all", Refusal(Reason.BUDGET, None, text, plans.advice)),)))
