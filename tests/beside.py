"""A function of float64 tensors, compiled with mst_fx beside eager execution: `fuzzing.harness` for tests by hand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from fuzzing import harness

import mst_fx


def leaf(*shape: int) -> torch.Tensor:
    """Normal numbers that get a gradient."""
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def beside_eager(
    fn: Callable[..., Any],
    args: Callable[[int], Sequence[Any]],
    calls: int = 1,
    *,
    dynamic: bool | None = None,
    backward: str = "all",
    upstream: str = "dense",
    **options: Any,
) -> list[mst_fx.Report]:
    """Compare values, gradients and what is left in the arguments, call by call; no gradient is not zeros.

    Args:
        fn: a function, or a class of modules.
        args: gives the arguments of a call; those that require a gradient are compared by it.
        calls: how many.
        dynamic: of `torch.compile`.
        backward: from which results, see `harness.back`.
        upstream: the layout of the gradients that come in, see `harness.cotangent`.
        **options: of the backend.

    Returns:
        The reports, one a compile.
    """

    def inputs(call: int) -> tuple[list[torch.Tensor], Sequence[Any]]:
        given = args(call)
        return [x for x in given if isinstance(x, torch.Tensor) and x.requires_grad], given

    merged = {"min_bytes": 0, "num_chunks": 3, "strict": True, "inner": "eager", **options}
    known = mst_fx.reports()
    harness.compare(fn, inputs, calls, {"backend": "mst_fx", "dynamic": dynamic, "options": merged}, backward, upstream)
    return [report for report in mst_fx.reports() if not any(report is other for other in known)]


def report_beside_eager(
    program: Callable[..., Any],
    *shapes: Sequence[int],
    inputs: Callable[[int], Sequence[Any]] | None = None,
    **options: Any,
) -> mst_fx.Report:
    """The report of the one compile of one call, of normal numbers in these shapes where no inputs are given."""
    (report,) = beside_eager(program, inputs or (lambda _: [leaf(*shape) for shape in shapes]), **options)
    return report


def looped_regions(reports: Sequence[mst_fx.Report]) -> int:
    """How many regions of the first compile run as loops."""
    return len(reports[0].regions)
