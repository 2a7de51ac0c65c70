"""Losses and gradients of a compiled step against a float64 eager truth, under eager's own error."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

import mst_fx

TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}
"""What our relative error (norm of the difference over norm of the truth) may be above eager's own."""

LoopAll = {"min_bytes": 0, "chunk_tokens": 16, "strict": True, "inner": "eager", "verify": True}


def looped(fn: Callable[..., Any], dynamic: bool | None = None, **options: Any) -> Callable[..., Any]:
    """Compile with loops of 16 tokens for everything; `options` override."""
    merged = {**LoopAll, **options}
    if merged.get("num_chunks"):
        merged.pop("chunk_tokens")
    return torch.compile(fn, backend=mst_fx.backend, options=merged, dynamic=dynamic)


def gradients(model: nn.Module, fn: Callable[..., Any], inputs: Sequence[Any]) -> dict[str, torch.Tensor]:
    """The loss and every parameter's gradient, in float64."""
    model.zero_grad(set_to_none=True)
    loss = fn(*inputs)
    loss.backward()
    grads = {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach().double(), **grads}


def relative_error(value: torch.Tensor, truth: torch.Tensor) -> float:
    """Norm of the difference over the norm of the truth."""
    return float((value - truth).norm() / truth.norm().clamp_min(1e-30))


def assert_as_good_as_eager(
    model: nn.Module,
    inputs: Sequence[Any],
    *,
    step: Callable[..., torch.Tensor] | None = None,
    dtype: torch.dtype = torch.float64,
    regions: int | None = None,
    **options: Any,
) -> mst_fx.Report:
    """Compare `step(model, *inputs)` (default: `model(*inputs)`) with eager; return the report of the compile.

    Args:
        model: in any dtype; copies are made.
        inputs: floating-point tensors are cast to the dtype.
        step: gives the loss.
        dtype: of the model under test.
        regions: how many regions must be looped.
        **options: of the backend.
    """
    torch._dynamo.reset()
    run = step or (lambda m, *args: m(*args))
    exact, own = copy.deepcopy(model).double(), copy.deepcopy(model).to(dtype)
    truth = gradients(exact, lambda *args: run(exact, *args), cast(inputs, torch.float64))
    eager = gradients(own, lambda *args: run(own, *args), cast(inputs, dtype))
    before = len(mst_fx.reports())
    ours = gradients(own, looped(lambda *args: run(own, *args), **options), cast(inputs, dtype))
    made = mst_fx.reports()[before:]
    report = sum(made[1:], made[0])
    assert ours.keys() == eager.keys()
    for name, exact_value in truth.items():
        error, allowed = relative_error(ours[name], exact_value), relative_error(eager[name], exact_value)
        assert error <= allowed + TOLERANCE[dtype], f"{name}: error {error:.2e}, eager's own {allowed:.2e}"
    if regions is not None:
        assert len(report.regions) == regions, str(report)
    return report


def cast(inputs: Sequence[Any], dtype: torch.dtype) -> list[Any]:
    """Floating-point tensors in another dtype, the rest as it is."""
    return [
        x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() and x.dtype != torch.bool else x
        for x in inputs
    ]
