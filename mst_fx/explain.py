"""explain(): compile, run once, and tell what was looped, what was not, and why."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.fx import GraphModule

from mst_fx.pipeline import backend
from mst_fx.report import Report, reports


def explain(fn: Callable[..., Any], *args: Any, options: dict[str, Any] | None = None, **kwargs: Any) -> Report:
    """Compile `fn` for these arguments, run it once, and report every decision of the pass.

    Args:
        fn: a function or module, not compiled yet.
        *args: of `fn`.
        options: as for torch.compile; `inner` is "eager" here unless it is given, which saves Inductor's time.
        **kwargs: of `fn`.

    Returns:
        One report over all graphs that the call made.
    """
    made: list[Report] = []

    def watched(gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        compiled = backend(gm, inputs, options={"inner": "eager", **(options or {})})
        made.append(reports()[-1])
        return compiled

    torch.compile(fn, backend=watched)(*args, **kwargs)
    return sum(made[1:], made[0]) if made else Report(graphs=0)
