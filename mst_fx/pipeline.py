"""backend(): the graph that Dynamo captured -> the same graph with loops, compiled.

survey     gm, patterns             -> regions, subgraphs, refusals
  narrow     gm                       -> gm in which heads project only the tokens that are read
  discover   gm, patterns             -> Region | Refusal
  analysis   region                   -> aten graph, cut into stages before, in and after the loop; which gradients
  memory     work, bodies             -> bytes as a function of the chunk length; cost: milliseconds
plan       regions, rest of the graph, device, options -> chunk lengths | Refusal, for all regions at once
assembly   work, lengths            -> aten bodies of one chunk
verify     region, bodies           -> Verified | Refusal, if it is asked for
rewrite    gm, bodies               -> gm'
inner      gm'                      -> what torch.compile calls
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from torch.fx import GraphModule

from mst_fx.analysis import fix_for
from mst_fx.captured_again import let_dynamo_capture_loops
from mst_fx.clean_room import clean_room
from mst_fx.config import Config
from mst_fx.inner import CapturedAnew, inductor_options, inner_compiler, writes_python
from mst_fx.lower import long_lengths, marked_sizes
from mst_fx.pattern import Pattern, patterns
from mst_fx.plan import Plan, Plans, make_plans
from mst_fx.readable import readable
from mst_fx.refusal import Reason, Refusal
from mst_fx.report import Report, looped, record, refused
from mst_fx.rewrite import Edit, Replacement, loop, rebuilt
from mst_fx.survey import Site, Surveyed, Surveyor, device_of_graph, timeline_of

log = logging.getLogger("mst_fx")


def backend(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
    **ignored: Any,
) -> Callable[..., Any]:
    """A backend of torch.compile that runs regions with large intermediates as loops over mini-sequences.

    Args:
        gm: the captured graph; it stays as it is.
        example_inputs: fake or real inputs.
        mode: of torch.compile, for Inductor.
        options: those of `Config`, and Inductor's own.
        **ignored: what later torch versions hand to backends (`name`).

    Returns:
        The compiled function.

    Raises:
        ValueError, TypeError: an option that nobody knows, or with a value that it does not take.
    """
    config, foreign = Config.split(options, inductor_options())
    compile_graph = inner_compiler(config, mode, foreign)
    let_dynamo_capture_loops()
    rewritten, report = _rewrite_safely(gm, config, foreign)
    try:
        compiled = compile_graph(rewritten, example_inputs)
    except CapturedAnew:
        raise
    except Exception:
        if config.strict or rewritten is gm:
            raise
        log.warning("mst_fx: the looped graph does not compile; compiling it unlooped", exc_info=True)
        compiled = compile_graph(gm, example_inputs)
    record(report)
    log.info("%s", report)
    return compiled


def _rewrite_safely(gm: GraphModule, config: Config, foreign: dict[str, Any]) -> tuple[GraphModule, Report]:
    """A bug of ours costs the loops, never the compile."""
    chosen = patterns(config.disable)
    if config.inner == "inductor" and not writes_python(foreign):
        refusal = Refusal(Reason.BACKEND, None, "Inductor's C++ wrapper cannot call the loop")
        return gm, Report(refusals=(refused("all", refusal),))
    try:
        return rewrite(gm, config, chosen)
    except Exception as error:
        if config.strict:
            raise
        log.warning("mst_fx: the pass failed; compiling the graph unlooped", exc_info=True)
        return gm, Report(refusals=(refused("all", Refusal(Reason.INTERNAL, None, repr(error))),))


@contextmanager
def _without_collections() -> Iterator[None]:
    """One search for garbage walks all that a large program holds, and takes as long as the whole pass."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def rewrite(gm: GraphModule, config: Config, chosen: Sequence[Pattern]) -> tuple[GraphModule, Report]:
    """The graph with loops, and the decisions; `gm` itself where nothing is changed."""
    with clean_room(), _without_collections():
        return _rewrite(gm, config, chosen)


def _rewrite(gm: GraphModule, config: Config, chosen: Sequence[Pattern]) -> tuple[GraphModule, Report]:
    surveyor = Surveyor(config, chosen, marked_sizes(gm))
    surveyed = surveyor.survey(gm)
    plans = _planned(surveyor, surveyed, due=_due(surveyor, surveyed))
    rewritten, report = _rewritten(surveyed, surveyor, dict(zip(surveyed.all_sites(), plans.of, strict=True)))
    return rewritten or gm, replace(_with_budget(report, plans), peak=plans.peak, peak_whole=plans.peak_whole)


def _planned(surveyor: Surveyor, surveyed: Surveyed, due: Container[Site] = ()) -> Plans:
    """The decisions for all regions of a graph."""
    offers = [surveyor.offer(site, due=site in due) for site in surveyed.all_sites()]
    return make_plans(offers, timeline_of(surveyed), device_of_graph(surveyed), surveyor.config)


def _due(surveyor: Surveyor, surveyed: Surveyed) -> set[Site]:
    """What is looped for lengths that may come, however short the captured one: loops that compute nothing again.

    Such a loop costs a short sequence nothing: it is one chunk. Where something is computed again, it would be lost, so
    these regions are judged by the length that was captured.
    """
    varying = {site for site in surveyed.all_sites() if site.work.stages.dynamic and not site.recomputes}
    if not varying or surveyor.config.min_bytes is not None:
        return set()
    with long_lengths():
        plans = _planned(surveyor, surveyed)
    return {site for site, plan in zip(surveyed.all_sites(), plans.of, strict=True) if plan.lengths} & varying


def _rewritten(surveyed: Surveyed, surveyor: Surveyor, plans: dict[Site, Plan]) -> tuple[GraphModule | None, Report]:
    """The graph with loops, None where it needs no change; and the decisions about it and its subgraphs."""
    report, edits = surveyed.report, []
    for site in surveyed.sites:
        plan = plans[site]
        if plan.lengths is None:
            refusal = Refusal(Reason.SMALL, site.region.last, plan.reason)
            report = report.joined(Report(refusals=(refused(site.pattern, refusal),)))
            continue
        verified = surveyor.verified(site, plan.lengths)
        if isinstance(verified, Refusal):
            report = report.joined(Report(refusals=(refused(site.pattern, verified),)))
            continue
        fix_for(site.region, site.work)
        replacement = Replacement(
            site.region, site.work.stages, surveyor.call(site.work, plan.lengths), site.around.kept
        )
        detached = site.region.returned if surveyor.config.returned_logits == "detach" else ()
        edits.append(Edit(site.region, partial(loop, replacement=replacement), detached))
        entry = looped(site.pattern, site.region, site.work, plan, detached)
        if verified is not None:
            entry = replace(entry, verified=verified.holds, verification=verified.text)
        report = report.joined(Report(regions=(entry,)))
    children: dict[str, GraphModule] = {}
    for name, (child, _) in surveyed.children.items():
        new_child, inner_report = _rewritten(child, surveyor, plans)
        report = report.joined(inner_report)
        children.update({name: new_child} if new_child is not None else {})
    changed = edits or children or surveyed.report.cuts or surveyed.report.dropped
    return rebuilt(surveyed.reader.owner, edits, children) if changed else None, report


def _with_budget(report: Report, plans: Plans) -> Report:
    """With a word about a budget that is missed."""
    if plans.budget is None or plans.peak <= plans.budget:
        return report
    text = (
        f"no choice of loops keeps to {readable(plans.budget)}: the least is {readable(plans.peak)} (predicted); "
        f"what would help: {plans.advice}"
    )
    log.warning("mst_fx: memory_budget: %s", text)
    return report.joined(Report(refusals=(refused("all", Refusal(Reason.BUDGET, None, text)),)))
