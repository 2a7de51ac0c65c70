"""explain(): compile, run once, and report what is looped, what is not, and why.

Private torch API: the mark of functions that Dynamo leaves alone. Run on torch 2.11, 2.13 and 2.15.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.fx import GraphModule

from mst_fx.pipeline import compiled_and_told
from mst_fx.report.report import Report


def explain(fn: Callable[..., Any], *args: Any, options: dict[str, Any] | None = None, **kwargs: Any) -> Report:
    """Compile `fn` for these arguments, run it once, and report every decision of the pass.

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
    made: list[Report] = []

    def watched(gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        compiled, report = compiled_and_told(gm, inputs, None, {"inner": "eager", **(options or {})})
        made.append(report)
        return compiled

    original, notes = _uncompiled(fn)
    torch.compile(original, backend=watched)(*args, **kwargs)
    report = sum(made[1:], made[0]) if made else Report(graphs=0)
    return replace(report, notes=report.notes + notes)


def _uncompiled(fn: Callable[..., Any]) -> tuple[Callable[..., Any], tuple[str, ...]]:
    """Return the function to compile, and a note where `fn` is compiled already."""
    note = "it is compiled already; this is the report of a compile of its own, with the options given to explain()"
    context = torch._dynamo.eval_frame.DisableContext
    if getattr(fn, "_torchdynamo_disable", False) or isinstance(getattr(fn, "dynamo_ctx", None), context):
        return fn, ()
    wrapped = getattr(fn, "_orig_mod", None) or getattr(fn, "_torchdynamo_orig_callable", None)
    if wrapped is not None:
        original, _ = _uncompiled(wrapped)
        return original, (note,)
    if isinstance(fn, torch.nn.Module) and getattr(fn, "_compiled_call_impl", None) is not None:
        return fn._call_impl, (note,)
    return fn, ()
