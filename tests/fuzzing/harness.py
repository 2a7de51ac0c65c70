"""Runs a program compiled with mst_fx beside eager, call by call, and tells the first difference.

This file needs nothing but torch and mst_fx: its text goes in front of every program that failed, so that one can
paste it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

import mst_fx

warnings.filterwarnings("ignore")
D = torch.float64
RELATIVE, NARROW, COARSE = 1e-9, 1e-5, 5e-2  # of norms: where all is float64, where values go through less bits
NOISE = [0.0]  # relative noise on every input: how far does rounding alone carry?


class DifferentError(AssertionError):
    """A value or a gradient is not eager's, or a report holds an internal error."""


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
        return 2 * g * ctx.saved_tensors[0]


class StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return (x * 4).floor() / 4

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> torch.Tensor:
        return g


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, factor: float) -> torch.Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.factor * g, None


class Clipped(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, bound: float) -> torch.Tensor:
        ctx.bound = bound
        return x.clone()

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor, None]:
        return g.clamp(-ctx.bound, ctx.bound), None


class RowScaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        scale = x.abs().amax(-1, keepdim=True) + 1
        ctx.save_for_backward(x, w, scale)
        return x / scale * w

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, w, scale = ctx.saved_tensors
        return g * w / scale, (g * x).flatten(0, -2).sum(0)


class Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x, w = ctx.saved_tensors
        return g @ w.t() * 2, x.flatten(0, -2).t() @ g.flatten(0, -2) / 2


class Block(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        h = x @ up
        ctx.save_for_backward(x, up, down, h)
        return h.tanh() @ down

    @staticmethod
    def backward(ctx: Any, g: torch.Tensor) -> tuple[torch.Tensor, ...]:
        x, up, down, h = ctx.saved_tensors
        of_h = g @ down.t() * h.cos()
        rows, of_rows = x.flatten(0, -2), g.flatten(0, -2)
        return of_h @ up.t(), rows.t() @ of_h.flatten(0, -2), h.tanh().flatten(0, -2).t() @ of_rows


OWN = (Square, StraightThrough, Scaled, Clipped, RowScaled, Product, Block)


def normal(*shape: int, grad: bool = True, dtype: torch.dtype = D, scale: float = 1.0) -> torch.Tensor:
    """A leaf of normal numbers."""
    x = torch.randn(shape, dtype=dtype) * scale
    if NOISE[0]:
        x = x * (1 + NOISE[0] * torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(5)))
    return x.requires_grad_(grad)


def weight(*shape: int, grad: bool = True, dtype: torch.dtype = D, scale: float = 1.0) -> nn.Parameter:
    return nn.Parameter(normal(*shape, grad=False, dtype=dtype, scale=scale), requires_grad=grad)


def indices(below: int, *shape: int) -> torch.Tensor:
    return torch.randint(below, shape)


def cotangent(y: torch.Tensor, how: str) -> torch.Tensor:
    """An upstream gradient, as later ops leave them: dense, expanded, transposed or zero."""
    if how == "zero":
        return torch.zeros_like(y, memory_format=torch.contiguous_format)
    if how == "expanded":
        return torch.randn((), dtype=y.dtype).expand(y.shape)
    if how == "transposed" and y.dim() > 1:
        return torch.randn(y.shape[::-1], dtype=y.dtype).permute(*range(y.dim() - 1, -1, -1))
    return torch.randn(y.shape, dtype=y.dtype)


def back(outs: Sequence[torch.Tensor], backward: str, how: str) -> None:
    """Back-propagate "all" results, the "first" or the "last", all of them "twice", or "each" one after the other."""
    if backward == "first":
        outs = outs[:1]
    elif backward == "last":
        outs = outs[-1:]
    groups = [[y] for y in outs] if backward == "each" else [outs] * (2 if backward == "twice" else 1)
    for group in groups:
        if group:
            torch.autograd.backward(group, [cotangent(y, how) for y in group], retain_graph=len(groups) > 1)


def held(fn: Any) -> dict[str, torch.Tensor]:
    """The tensors of a module: parameters, and those that are plain attributes."""
    if not isinstance(fn, nn.Module):
        return {}
    fn = getattr(fn, "_orig_mod", fn)
    return {name: x for name, x in (vars(fn) | fn._parameters).items() if isinstance(x, torch.Tensor)}


def results(fn: Any, inputs: Callable[[int], Any], call: int, backward: str, how: str) -> dict[str, Any]:
    """What a call returns, what it leaves in its arguments, and the gradients of a backward."""
    torch.manual_seed(100 + call)
    leaves, args = inputs(call)
    leaves = {str(i): x for i, x in enumerate(leaves)} | held(fn)
    for x in leaves.values():
        x.grad = None
    outs = pytree.tree_leaves(fn(*args))
    found = {f"value {i}": y.detach().clone() if isinstance(y, torch.Tensor) else y for i, y in enumerate(outs)}
    found |= {f"argument {i}": x.detach().clone() for i, x in enumerate(args) if isinstance(x, torch.Tensor)}
    differentiable = [y for y in outs if isinstance(y, torch.Tensor) and y.requires_grad]
    found["differentiable"] = [i for i, y in enumerate(outs) if isinstance(y, torch.Tensor) and y.requires_grad]
    torch.manual_seed(7)
    back(differentiable, backward, how)
    return found | {f"gradient {name}": x.grad for name, x in leaves.items() if x.requires_grad}


def distance(ours: Any, eager: Any, relative: float) -> float:
    """How far apart two results are, 1 being the most that is allowed."""
    if not (isinstance(ours, torch.Tensor) and isinstance(eager, torch.Tensor)):
        return 0.0 if type(ours) is type(eager) and ours == eager else float("inf")
    if ours.shape != eager.shape or ours.dtype != eager.dtype:
        return float("inf")
    ours, eager = _reals(ours), _reals(eager)
    odd = ~(ours.isfinite() & eager.isfinite())
    if not torch.equal(ours[odd].nan_to_num(7.0), eager[odd].nan_to_num(7.0)):
        return float("inf")
    ours, eager = ours[~odd], eager[~odd]
    return float((ours - eager).norm() / (relative * (eager.norm() + 0.1)))


def _reals(x: torch.Tensor) -> torch.Tensor:
    x = x.detach()
    return torch.view_as_real(x.resolve_conj()).double() if x.is_complex() else x.double()


def only_one_is_none(ours: torch.Tensor | None, eager: torch.Tensor | None) -> bool:
    """Whether one has no gradient where the other has zeros: optimizers with weight decay tell them apart."""
    one = ours if eager is None else eager
    return (ours is None) != (eager is None) and one is not None and not one.any()


def farthest(ours: dict[str, Any], eager: dict[str, Any], relative: float) -> tuple[float, str]:
    far, name = max((distance(ours[name], eager[name], relative), name) for name in eager)
    return (far, name) if far > 1 else (0.0, "")


def made(program: Any) -> Any:
    """The function, or a module with the same numbers every time."""
    torch.manual_seed(3)
    return program() if isinstance(program, type) else program


@torch._functorch.config.patch(donated_buffer=False)  # else no graph can be kept for another backward
def compare(
    program: Any,
    inputs: Any,
    calls: int,
    compiling: dict[str, Any],
    backward: str,
    how: str,
    relative: float = RELATIVE,
) -> int:
    """Each call compiled and in eager mode; returns the number of loops.

    Raises:
        DifferentError: a result differs, or a report holds an internal error, or a loop that `verify` found to differ.
    """
    torch._dynamo.reset()
    before = {id(report): report for report in mst_fx.reports()}
    fn, twin = made(program), made(program)
    compiled = torch.compile(fn, **compiling)
    for call in range(calls):
        eager = results(twin, inputs, call, backward, how)
        ours = results(compiled, inputs, call, backward, how)
        absent = [name for name in eager if name.startswith("gradient") and only_one_is_none(ours[name], eager[name])]
        far, name = farthest(ours, {name: x for name, x in eager.items() if name not in absent}, relative)
        if far:
            raise DifferentError(f"{name} of call {call} differs, {far:.1e} times what is allowed")
        if absent:
            raise DifferentError(f"{absent[0]} of call {call} is None or zero, and the other in eager mode")
    reports = [report for report in mst_fx.reports() if id(report) not in before]
    for refusal in (refusal for report in reports for refusal in report.refusals):
        if refusal.reason in ("INTERNAL", "DIFFERS"):
            raise DifferentError(f"internal error, {refusal.reason}: {refusal.text}")
    return sum(len(report.regions) for report in reports)
