"""backend(): the graph that Dynamo captured -> the same graph with loops, compiled.

The stages, what they take and what they give:

survey     gm, patterns             -> regions, subgraphs, refusals
  localise   gm                       -> gm in which ops on DTensors run on shards
  narrow     gm                       -> gm in which heads project only the tokens that are read
  discover   gm, patterns             -> Region | Refusal
  analysis   region                   -> aten graph in stages before, in and after the loop; which gradients
  memory     work, bodies             -> bytes as a function of the chunk length; cost: milliseconds
plan       regions, rest of the graph, device, options -> chunk lengths | Refusal, for all regions at once
assembly   work, lengths            -> aten bodies of one chunk
verify     region, bodies           -> Verified | Refusal, with the option `verify`
rewrite    gm, bodies               -> gm'
inner      gm', what is offloaded   -> what torch.compile calls

`engine` runs all but the last. It is loaded late: a torch version that lacks a name which it needs has no loops, but
`import mst_fx` and compiles work.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch.fx import GraphModule

from mst_fx.core.clean_room import modes_given_back
from mst_fx.core.config import Config
from mst_fx.core.faults import refusal_for, unfit_torch, words_of
from mst_fx.core.provenance import source_line
from mst_fx.core.refusal import Reason, Refusal
from mst_fx.core.torch_private import inductor
from mst_fx.core.torch_private.dynamo import PASSING
from mst_fx.inner_compiler import (
    Compile,
    inner_compiler,
    joins_collectives,
    stays_on_device,
    taken_partitioner,
    writes_python,
)
from mst_fx.report.files import DebugFiles
from mst_fx.report.items import RefusedRegion, refused
from mst_fx.report.report import Report, record
from mst_fx.runtime.offload import plan_for_next, planned

if TYPE_CHECKING:
    from mst_fx.engine import Engine, Rewritten
    from mst_fx.recognise.pattern import Pattern

log = logging.getLogger("mst_fx")

ATTEMPTS = 4
"""Number of kinds of loops to try one by one, where the inner compiler fails on all of them together."""


def backend(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
    **ignored: Any,
) -> Callable[..., Any]:
    """Compile a graph for torch.compile, with regions of large intermediates as loops over mini-sequences.

    Args:
        gm: the captured graph; it stays as it is.
        example_inputs: fake or real inputs.
        mode: torch.compile's mode, for Inductor.
        options: options of `Config`, and Inductor's own.
        **ignored: arguments that later torch versions hand to backends (`name`).

    Returns:
        The compiled function, which takes and gives what the graph does.

    Raises:
        ValueError: an unknown option or pattern name, or options that exclude each other.
        TypeError: an option has a value that it does not take.
    """
    return compiled_and_told(gm, example_inputs, mode, options)[0]


def compiled_and_told(
    gm: GraphModule, example_inputs: Sequence[Any], mode: str | None, options: dict[str, Any] | None
) -> tuple[Callable[..., Any], Report]:
    """Return the compiled function and the report about it; arguments and errors as for `backend`."""
    config, foreign = Config.split(options, inductor.option_names())
    config, stays = _offloading(config, stays_on_device(config, mode, foreign))
    files = DebugFiles(config.debug_dir, strict=config.strict)
    files.captured(gm)
    compile_graph = files.watching(inner_compiler(config, mode, foreign))
    engine = _engine(gm, config, foreign)
    if isinstance(engine, Refusal):
        compiled, report = compile_graph(gm, example_inputs), Report(refusals=(refused("all", engine),))
    else:
        compiled, report = _compiled(engine, compile_graph, example_inputs)
    report = replace(report, refusals=report.refusals + stays)
    record(report)
    log.info("%s", report)
    files.report(report)
    return compiled, report


def looped_and_told(gm: GraphModule, config: Config) -> GraphModule:
    """Return a graph with loops, `gm` itself where nothing changes, and record the report.

    Args:
        gm: the captured graph; it stays as it is.
        config: the user's options; Inductor compiles the graph.
    """
    stays = stays_on_device(config, None, {}) or taken_partitioner(config)
    config, told = _offloading(config, stays)
    files = DebugFiles(config.debug_dir, strict=config.strict)
    files.captured(gm)
    engine = _engine(gm, config, {})
    try:
        rewritten = engine if isinstance(engine, Refusal) else engine.rewritten()
    except Exception as error:
        rewritten = refusal_for(error, None, "the pass failed", strict=config.strict)
    if isinstance(rewritten, Refusal):
        module, report, offload = gm, Report(refusals=(refused("all", rewritten),)), None
    else:
        module, report, offload = rewritten.module, rewritten.report, rewritten.offload
    report = replace(report, refusals=report.refusals + told)
    plan_for_next(offload)
    _check_host(report)
    for entry in report.dropped:  # no code of ours runs behind the compiled code, to return what says why
        log.warning("%s; None is returned for them", entry.instead)
    record(report)
    log.info("%s", report)
    files.looped(module)
    files.report(report)
    return module


def rewrite(gm: GraphModule, config: Config, chosen: Sequence[Pattern]) -> tuple[GraphModule, Report]:
    """Return the graph with loops and the report; `gm` itself where nothing changes.

    Args:
        gm: the captured graph; it stays as it is.
        config: the user's options.
        chosen: the patterns to recognise regions by.
    """
    from mst_fx.engine import Engine

    rewritten = Engine(gm, config, chosen).rewritten()
    return rewritten.module, rewritten.report


def _engine(gm: GraphModule, config: Config, foreign: dict[str, Any]) -> Engine | Refusal:
    """Return the pass over a graph, or why there is none: a bug of ours, or a torch version that lacks a name.

    Raises:
        ValueError: the option `disable` names an unknown pattern.
    """
    if config.inner == "inductor" and not writes_python(foreign):
        return Refusal(Reason.BACKEND, None, "Inductor's C++ wrapper cannot call the loop")
    if (unfit := unfit_torch()) is not None:
        return Refusal(Reason.TORCH, None, unfit)
    try:
        from mst_fx import engine
        from mst_fx.recognise import pattern
        from mst_fx.runtime import dynamo_capture

        if config.inner == "inductor":
            import mst_fx.runtime.inductor_lowering  # noqa: F401 - registers the lowering

        dynamo_capture.let_dynamo_capture_loops()
        known = pattern.patterns()
    except Exception as error:
        return refusal_for(error, None, "the pass cannot be loaded", strict=config.strict)
    chosen = pattern.patterns(config.disable) if config.disable else known
    try:
        on_shards = config.inner != "inductor" or not joins_collectives(foreign)
        return engine.Engine(gm, config, chosen, on_shards=on_shards)
    except Exception as error:
        return refusal_for(error, None, "the pass failed", strict=config.strict)


def _compiled(engine: Engine, compile_graph: Compile, inputs: Sequence[Any]) -> tuple[Callable[..., Any], Report]:
    """Compile the graph with loops, or with those that the pass and the inner compiler can do."""
    try:
        rewritten = engine.rewritten()
    except Exception as error:
        refusal = refusal_for(error, None, "the pass failed", strict=engine.config.strict)
        return compile_graph(engine.gm, inputs), Report(refusals=(refused("all", refusal),))
    _check_host(rewritten.report)
    try:
        with modes_given_back(), planned(rewritten.offload):
            return _telling(engine, rewritten, compile_graph(rewritten.module, inputs)), rewritten.report
    except PASSING:
        raise
    except Exception as error:
        if engine.config.strict or rewritten.module is engine.gm:
            raise
        return _compiled_in_part(engine, rewritten, compile_graph, inputs, error)


def _compiled_in_part(
    engine: Engine, rewritten: Rewritten, compile_graph: Compile, inputs: Sequence[Any], error: Exception
) -> tuple[Callable[..., Any], Report]:
    """Compile the graph with the loops that the inner compiler can do.

    The first try has no loops: if it fails, the program is at fault, and its error is the one to raise. Loops that are
    alike are tried together.
    """
    compiled = compile_graph(engine.copy(), inputs)
    text = f"the looped graph does not compile: {words_of(error)}"
    log.debug("mst_fx: %s", text, exc_info=error)
    left = dict.fromkeys(rewritten.works, text)
    report = None
    for work in rewritten.works[:ATTEMPTS] if len(rewritten.works) > 1 else ():
        tried = {other: why for other, why in left.items() if other is not work}
        try:
            attempt = engine.rewritten(tried)
            with modes_given_back(), planned(attempt.offload):
                compiled = _telling(engine, attempt, compile_graph(attempt.module, inputs))
                report, left = attempt.report, tried
        except PASSING:
            raise
        except Exception as failure:
            log.debug("mst_fx: nor with a loop less", exc_info=failure)
            left[work] = f"the looped graph does not compile: {words_of(failure)}"
    if report is None:
        report = _unlooped(engine.rewritten(left).report, text)
    log.warning("mst_fx: %s; compiled with %d of %d loops", text, len(report.regions), len(rewritten.sites))
    return compiled, report


def _telling(engine: Engine, rewritten: Rewritten, compiled: Callable[..., Any]) -> Callable[..., Any]:
    """Return the compiled function; where it returns None for logits, they are an object that says why when used."""
    if not rewritten.report.dropped:
        return compiled
    from mst_fx.runtime.not_returned import NotReturned, returning

    before, after = (_outputs(gm) for gm in (engine.gm, rewritten.module))
    of_line = {entry.source: entry for entry in rewritten.report.dropped}
    missing = {}
    for position, (node, kept) in enumerate(zip(before, after, strict=True)):
        if node is not None and kept is None:
            entry = of_line.get(source_line(node), rewritten.report.dropped[0])
            missing[position] = NotReturned(entry.instead)
    return returning(compiled, missing)


def _offloading(config: Config, stays: str | None) -> tuple[Config, tuple[RefusedRegion, ...]]:
    """Return the options without offloading, and why, where the compiler lets nothing go to the host."""
    if stays is None:
        return config, ()
    log.warning("mst_fx: nothing goes to the host: %s", stays)
    advice = (
        "Compile with Inductor, without CUDA graphs, a mode that uses them or a partitioner in the compile's options."
    )
    refusal = Refusal(Reason.BACKEND, None, f"nothing goes to the host: {stays}", advice)
    return replace(config, offload=None), (refused("offload", refusal),)


def _check_host(report: Report) -> None:
    """Check that the host has memory for what a step sends there.

    Raises:
        HostMemoryError: it has not.
    """
    sent = sum(each.bytes for each in report.offloaded)
    if sent:
        from mst_fx.runtime.host_memory import check_room

        check_room(sent)


def _outputs(gm: GraphModule) -> Sequence[Any]:
    outputs: Any = gm.graph.output_node().args[0]
    return outputs  # Dynamo returns a flat tuple


def _unlooped(report: Report, text: str) -> Report:
    """Return the report of the captured graph without loops: nothing is cut or dropped either."""
    why = () if report.refusals else (refused("all", Refusal(Reason.INTERNAL, None, text)),)
    timelines = tuple(timeline.without_loops() for timeline in report.timelines)
    unlooped = replace(report, refusals=report.refusals + why, cuts=(), dropped=(), offloaded=(), timelines=timelines)
    return replace(unlooped, peak=report.peak_whole)
