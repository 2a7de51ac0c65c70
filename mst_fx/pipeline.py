"""backend(): the graph that Dynamo captured -> the same graph with loops, compiled.

narrow     gm                       -> gm in which heads project only the tokens that are read
discover   gm, patterns             -> Region | Refusal
lower      region                   -> aten graph
cut        aten graph, stream       -> stages before, in and after the loop (placements inside)
plan       region, stages, options  -> Plan | Refusal
body       stages, plan             -> aten bodies of one chunk
rewrite    gm, plan, bodies         -> gm'
inner      gm'                      -> what torch.compile calls
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch.fx import GraphModule, Node

from mst_fx.body import Body, Gradients, axis_of, forward_body, gradient_body
from mst_fx.config import Config
from mst_fx.discover import discover, nested
from mst_fx.inner import inductor_options, inner_compiler, writes_python
from mst_fx.loop import VERSION
from mst_fx.lower import fake_value, lower
from mst_fx.mini_sequence import CallSpec
from mst_fx.narrow import cut_heads
from mst_fx.pattern import Pattern, patterns
from mst_fx.plan import Plan, make_plan
from mst_fx.reading import Reader
from mst_fx.refusal import Reason, Refusal
from mst_fx.region import Region
from mst_fx.report import LoopedRegion, Report, cut_head, looped, record, refused
from mst_fx.rewrite import Edit, Replacement, loop, nodes_of, rebuilt
from mst_fx.stages import Stages, cut

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
    rewritten, report = _rewrite_safely(gm, config, foreign)
    record(report)
    log.info("%s", report)
    if rewritten is gm:
        return compile_graph(gm, example_inputs)
    try:
        return compile_graph(rewritten, example_inputs)
    except Exception:
        if config.strict:
            raise
        log.warning("mst_fx: the looped graph does not compile; compiling it unlooped", exc_info=True)
        return compile_graph(gm, example_inputs)


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


def rewrite(gm: GraphModule, config: Config, chosen: Sequence[Pattern]) -> tuple[GraphModule, Report]:
    """The graph with loops, and the decisions; `gm` itself where nothing is changed."""
    reader, report = _cut_early(gm, config)
    gm = reader.owner
    edits: list[Edit] = []
    for found in discover(reader, chosen):
        try:
            if isinstance(found.outcome, Refusal):
                raise found.outcome
            edit, entry = best_replacement(found.pattern, found.outcome, config)
            edits.append(edit)
            report = report.joined(Report(regions=(entry,)))
        except Refusal as refusal:
            report = report.joined(Report(refusals=(refused(found.pattern, refusal),)))
    children: dict[str, GraphModule] = {}
    for name, child in nested(gm):
        new_child, inner_report = rewrite(child, config, chosen)
        report = report.joined(inner_report)
        if new_child is not child:
            children[name] = new_child
    return rebuilt(gm, edits, children) if edits or children else gm, report


def _cut_early(gm: GraphModule, config: Config) -> tuple[Reader, Report]:
    """A reader of the graph in which heads project only the tokens that are read."""
    report = Report()
    while True:
        reader = Reader(gm)
        found = [head for head in cut_heads(reader) if head.bytes_before >= config.min_bytes]
        if not found:
            return reader, report
        report = report.joined(Report(cuts=tuple(map(cut_head, found))))
        makes = [partial(nodes_of, region=head.region, lowered=head.cut_first) for head in found]
        gm = rebuilt(gm, [Edit(head.region, make) for head, make in zip(found, makes, strict=True)])


@dataclass(frozen=True)
class Planned:
    """A region that can be looped, and how."""

    region: Region
    stages: Stages
    plan: Plan


def best_replacement(pattern: str, region: Region, config: Config) -> tuple[Edit, LoopedRegion]:
    """Everything that stands between a region, or the best part of it, and its loop.

    Raises:
        Refusal: the region must not, or need not, be looped, nor any part of it.
    """
    chosen = _best_part(region, config)
    bodies, spec = _bodies(chosen.stages, chosen.plan, config)
    make = partial(loop, replacement=Replacement(chosen.region, chosen.stages, bodies, spec))
    return Edit(chosen.region, make, chosen.plan.detached), looped(pattern, chosen.region, chosen.stages, chosen.plan)


def _best_part(region: Region, config: Config) -> Planned:
    """The largest part that can be looped; where large values are returned, the one that leaves the fewest bytes."""
    parts: list[Planned] = []
    refusal: Refusal | None = None
    part: Region | None = region
    while part is not None and (part.returned or not parts):
        try:
            parts.append(_planned(part, config))
        except Refusal as error:
            refusal = refusal or error
        part = part.smaller
    if not parts:
        assert refusal is not None
        raise refusal
    return min(parts, key=lambda part: part.plan.bytes_after)


def _planned(region: Region, config: Config) -> Planned:
    lowered = lower(region.owner, region.nodes, region.live_ins, region.outputs, region.modes)
    placeholders = [node for node in lowered.graph.nodes if node.op == "placeholder"]
    stages = cut(lowered, placeholders[region.live_ins.index(region.stream)])
    needs_grad = _needs_grad(stages, dict(zip(placeholders, region.live_ins, strict=True)))
    return Planned(region, stages, make_plan(region, stages, needs_grad, config))


def _needs_grad(stages: Stages, live_in_of: dict[Node, Node]) -> dict[Node, bool]:
    """Which values before the loop need a gradient: floating-point ones that depend on a live-in that does."""
    needs: dict[Node, bool] = {}
    for node in stages.graph.nodes:
        value = node.meta.get("val")
        floating = value is not None and hasattr(value, "is_floating_point") and value.is_floating_point()
        if node in live_in_of:
            needs[node] = floating and bool(fake_value(live_in_of[node]).requires_grad)
        else:
            needs[node] = floating and any(needs[operand] for operand in node.all_input_nodes)
    return needs


def _bodies(stages: Stages, plan: Plan, config: Config) -> tuple[Any, CallSpec]:
    """The bodies of the call in the order of `Replacement.bodies`, and its spec."""
    ins = tuple(axis_of(stages, node) for node in stages.operands)
    forward, outs = _full_and_tail(stages, plan.forward_chunk, partial(forward_body, stages))
    spec = CallSpec(plan.backward, (VERSION, plan.forward_chunk, ins, outs), (), plan.differentiable, plan.wanted)
    if plan.backward == "none":
        return (*forward, None, None), spec
    in_forward = plan.backward == "in_forward"
    gradients = Gradients(plan.wanted, plan.differentiable, in_forward, config.accumulate, plan.kept)
    backward, outs = _full_and_tail(stages, plan.chunk, partial(gradient_body, stages, gradients))
    read = () if in_forward else (*plan.differentiable, *plan.kept)
    given = tuple(axis_of(stages, stages.results[i]) for i in read)
    return (*forward, *backward), spec._replace(backward_spec=(VERSION, plan.chunk, given + ins, outs), kept=plan.kept)


def _full_and_tail(
    stages: Stages, chunk: int, make: Callable[[int | None], Body]
) -> tuple[tuple[GraphModule, GraphModule | None], tuple[Any, ...]]:
    """The body of a full chunk, and that of the ragged last one: for any length where that is known at run time."""
    ragged = None if stages.dynamic else stages.length % chunk
    full, tail = make(chunk), make(ragged) if ragged != 0 else None
    if tail is not None and tail.outs != full.outs:
        raise AssertionError(f"the bodies of {chunk} and {ragged} positions differ: {full.outs}, {tail.outs}")
    return (full.module, tail.module if tail is not None else None), full.outs
