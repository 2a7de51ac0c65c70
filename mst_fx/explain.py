"""explain(): compile, run once, and report what is looped, what is not, and why."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.fx import GraphModule

from mst_fx.core.config import Config
from mst_fx.core.torch_private import dynamo, inductor
from mst_fx.pipeline import compiled_and_told
from mst_fx.report.report import Report


def explain(fn: Callable[..., Any], *args: Any, options: dict[str, Any] | None = None, **kwargs: Any) -> Report:
    """Compile `fn` for these arguments, run it once, and report every decision of the pass.

    Tensors on the device "meta" take no memory and no GPU: they stand for those of the machine's GPU, or of an H100.

    Args:
        fn: a function or module. If it is compiled already, the function that it was made of is compiled once more.
        *args: arguments of `fn`.
        options: as for torch.compile; by default `inner` is "eager" here, which saves Inductor's time.
        **kwargs: keyword arguments of `fn`.

    Returns:
        One report over all graphs that the call made.

    Raises:
        ValueError, TypeError: as `backend`; and any error of `fn` itself.
    """
    given = {"inner": "eager", **options} if isinstance(options, Mapping) else options or {"inner": "eager"}
    Config.split(given, inductor.option_names())  # a wrong option is an error here, not one inside of the compile
    made: list[Report] = []

    def watched(gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        compiled, report = compiled_and_told(gm, inputs, None, given)
        made.append(report)
        return compiled

    original, notes = _uncompiled(fn)
    before = dynamo.given_up()
    torch.compile(original, backend=watched)(*args, **kwargs)
    notes += tuple(
        dynamo.reason_to_give_up(each) for each in dynamo.given_up() if not any(each is old for old in before)
    )
    report = sum(made[1:], made[0]) if made else Report(graphs=0)
    return replace(report, notes=report.notes + notes)


def _uncompiled(fn: Callable[..., Any]) -> tuple[Callable[..., Any], tuple[str, ...]]:
    """Return the function to compile, and a note where `fn` is compiled already."""
    note = "it is compiled already; this is the report of a compile of its own, with the options given to explain()"
    original = None if dynamo.is_disabled(fn) else dynamo.compiled_from(fn)
    return (fn, ()) if original is None else (_uncompiled(original)[0], (note,))
