"""What goes to the host, as planned: for the partitioner and for the report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import Node

from mst_fx.core.config import Config
from mst_fx.core.readable import readable
from mst_fx.core.refusal import Reason, Refusal
from mst_fx.core.sizes import is_symbolic
from mst_fx.core.values import fake_value, plain_tensors
from mst_fx.plan.decisions import Plan, Plans
from mst_fx.report.items import refused
from mst_fx.report.report import Report
from mst_fx.runtime.offload import Offload
from mst_fx.survey.kept import Kept, stands_for_checkpoint
from mst_fx.survey.surveyed import Site, Surveyed

PATTERN = "offload"
"""Under this name a report tells why nothing goes to the host."""


def away_of(kept: Sequence[Kept]) -> Callable[[Node], int]:
    """Return a function that gives the bytes which a block may keep on the host, by the node that it begins with."""
    of_block = {each.block: each.bytes for each in kept}
    return lambda node: of_block.get(node, 0)


def offload_of(
    surveyed: Surveyed,
    plans: Plans,
    of_site: Mapping[Site, Plan],
    literals: Callable[[Site, Plan], Any],
    config: Config,
) -> Offload | None:
    """Return what the partitioner has to know; None where nothing goes to the host.

    Args:
        surveyed: the graph.
        plans: the decisions.
        of_site: the decision for each region.
        literals: gives the literals of the backward loop of a region.
        config: the user's options.
    """
    if not plans.offloaded:
        return None
    inputs = (fake_value(node) for node in surveyed.reader.owner.graph.find_nodes(op="placeholder"))
    parts = [part for value in inputs if isinstance(value, torch.nn.Parameter) for part in plain_tensors(value)]
    parameters = {(tuple(part.shape), part.dtype) for part in parts if not any(map(is_symbolic, part.shape))}
    loops = (literals(site, plan) for site, plan in of_site.items() if plan.lengths and stands_for_checkpoint(site))
    blocks = plans.offloaded if config.offload == "auto" else None
    return Offload(config.least_sent, blocks, frozenset(parameters), frozenset(loops), config.strict)


def told(kept: Sequence[Kept], plans: Plans, config: Config) -> Report:
    """Return a report with what goes to the host, or why nothing does.

    Args:
        kept: what the blocks of a graph with gradients keep.
        plans: the decisions.
        config: the user's options.
    """
    sent = [each for each in kept if each.values]
    if sent:
        return Report(offloaded=tuple(entry for each in sent[: plans.offloaded] for entry in each.entries()))
    small = sum(each.small for each in kept)
    if small:
        least = readable(config.least_sent)
        text = f"what checkpoints keep, {readable(small)} in all, is smaller than {least} a value"
        return _why(Refusal(Reason.SMALL, None, text, "Set min_bytes lower: 0 sends all."))
    return _why(Refusal(Reason.NO_CHECKPOINT, None, "no checkpointed block of this graph keeps a value for backward"))


def _why(refusal: Refusal) -> Report:
    return Report(refusals=(refused(PATTERN, refusal),))
