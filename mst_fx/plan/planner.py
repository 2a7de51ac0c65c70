"""Policy: offers, a timeline, a device, options -> which regions are looped, and how long their chunks are.

Plans depend only on shapes, options and the kind of device, so they are the same on every rank.
"""

from __future__ import annotations

from collections.abc import Sequence

from mst_fx.core.config import Config
from mst_fx.plan.by_budget import within
from mst_fx.plan.by_default import worth_it
from mst_fx.plan.choices import Choices
from mst_fx.plan.decisions import Plans, leaner, plan_of, what_would_help
from mst_fx.plan.offer import Offer
from mst_fx.predict.step_memory import Timeline
from mst_fx.predict.time import Device


def make_plans(offers: Sequence[Offer], timeline: Timeline, device: Device, config: Config) -> Plans:
    """Decide for all regions of a graph; return the plans, with predicted peaks in bytes and times in ms.

    Args:
        offers: one for each region.
        timeline: the rest of the graph.
        device: the device that the graph runs on.
        config: the user's options.
    """
    budget = config.budget_bytes(device.memory)
    captured = Choices(offers, timeline, device, config)
    choices = captured.offloading(len(timeline.stops) if config.offload == "checkpoints" else 0)
    choices, state = (choices, worth_it(choices)) if budget is None else within(choices, budget)
    peak, whole = choices.peak(state), captured.peak(captured.unlooped)
    return Plans(
        tuple(plan_of(choices, number, state) for number in range(len(offers))),
        peak,
        whole,
        budget,
        advice=what_would_help(choices, state, peak - budget) if budget is not None and peak > budget else "",
        leaner=leaner(choices, state) if budget is None else "",
        offloaded=choices.timeline.offloaded,
    )
