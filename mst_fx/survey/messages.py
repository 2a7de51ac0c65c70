"""Debug messages of the logger "mst_fx": each decision of the pass as it is taken. Texts are made only when written."""

from __future__ import annotations

import logging
from collections.abc import Mapping

from mst_fx.bodies.work import Work
from mst_fx.core.module_paths import At
from mst_fx.core.readable import readable
from mst_fx.core.refusal import Refusal
from mst_fx.plan.decisions import Plan, Plans
from mst_fx.plan.lengths import Lengths
from mst_fx.survey.surveyed import Site

log = logging.getLogger("mst_fx")


def tell_found(site: Site) -> None:
    """Tell of a region that can be looped."""
    nodes, stages = site.region.nodes, site.work.stages
    text = "mst_fx: found: %s at %s: %d ops, dim %d of %s positions, backward %s"
    log.debug(text, site.pattern, _at(site), len(nodes), stages.axis.dim, stages.length, site.work.backward)


def tell_refused(what: str, refusal: Refusal, region: object = None) -> None:
    """Tell of what is left as it was: a pattern's region, or a subgraph."""
    place = At(refusal.node, region)
    log.debug("mst_fx: refused: %s at %s: %s: %s", what, place, refusal.reason.name, refusal.text)


def tell_bodies(work: Work, lengths: Lengths) -> None:
    """Tell of bodies that have been traced; regions that are alike share them."""
    shape = work.stages.stream.meta["val"].shape
    log.debug("mst_fx: bodies: traced for tokens %s, chunks of %d positions", shape, lengths.chunk)


def tell_plans(plans: Plans, of_site: Mapping[Site, Plan]) -> None:
    """Tell of the plan for each region."""
    whole, peak = readable(plans.peak_whole), readable(plans.peak)
    log.debug("mst_fx: plan: the peak of a step goes from %s to %s", whole, peak)
    for site, plan in of_site.items():
        if plan.lengths is None:
            log.debug("mst_fx: plan: %s at %s: no loop: %s", site.pattern, _at(site), plan.reason)
        else:
            text = "mst_fx: plan: %s at %s: chunks of %d positions, %d of them, forward in chunks of %d"
            log.debug(text, site.pattern, _at(site), plan.lengths.chunk, plan.chunks, plan.lengths.forward)


def tell_left_out(site: Site, why: Exception) -> None:
    """Tell of a region with an error; all is decided anew without it."""
    log.debug("mst_fx: left out: %s at %s: %s", site.pattern, _at(site), why)


def tell_left_over(why: Exception) -> None:
    """Tell of changes of the graph that no loop needs; it is surveyed anew without them."""
    log.debug("mst_fx: survey: once more: %s", why)


def tell_spliced(site: Site) -> None:
    """Tell of a loop that stands in the graph."""
    log.debug("mst_fx: spliced: %s at %s", site.pattern, _at(site))


def _at(site: Site) -> At:
    return At(site.region.last, site.region)
