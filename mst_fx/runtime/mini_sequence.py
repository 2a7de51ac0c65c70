"""The differentiable call that replaces a region in the rewritten graph.

The backward goes one of two ways:
  recompute    the call saves the operands; a second loop recomputes each chunk and adds up its gradients
  in_forward   the region ends in one sum, so one loop computes it and its gradients, up to the upstream factor
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch

from mst_fx.core.clean_room import without_autocast
from mst_fx.runtime.loop_operator import mini_sequence_loop, results_saved


class CallSpec(NamedTuple):
    """The literals of one call; the graph holds `tuple(spec)`.

    Attributes:
        backward: "recompute", "in_forward" or "none".
        forward_spec: `LoopSpec` of the loop that computes only results.
        backward_spec: `LoopSpec` of the loop that computes gradients (after the results, for "in_forward").
        differentiable: positions of the results, and behind them of the sums, that have a gradient; the backward loop
            reads these gradients first.
        wanted: positions of the operands, and behind them of the projections, whose gradients the backward loop gives,
            in the order of its results.
        reused: positions of the results that exist anyway and are not recomputed; the backward loop reads the upstream
            gradients, then these, then the operands.
        saves_results: whether activation checkpointing saves the results of the forward loop that backward needs, in
            place of running the loop again.
        projections: number of values behind the operands that the loop does not read: it makes them, a chunk at a time,
            and gives their gradients, which pass on to what they are made of.
        sums: number of values that add up over the chunks, and are made behind the loop of its results: these have no
            gradients then, and `with_gradients` runs the backward loop.
    """

    backward: str
    forward_spec: tuple[Any, ...]
    backward_spec: tuple[Any, ...]
    differentiable: tuple[int, ...]
    wanted: tuple[int, ...]
    reused: tuple[int, ...] = ()
    saves_results: bool = False
    projections: int = 0
    sums: int = 0


def mini_sequence(
    forward: Any,
    forward_tail: Any,
    backward: Any,
    backward_tail: Any,
    raw_spec: tuple[Any, ...],
    *leaves: torch.Tensor,
) -> tuple[torch.Tensor, ...]:
    """Run a region as a loop over mini-sequences, and return its results, each contiguous.

    Args:
        forward: body that computes the results of a full chunk, None where gradients are made in the forward.
        forward_tail: the same for the ragged last chunk, None where there is none.
        backward: body that computes the gradients of a full chunk, None where none is needed.
        backward_tail: the same for the ragged last chunk, None where there is none.
        raw_spec: a `CallSpec` as a tuple.
        leaves: the values that the region reads, and the projections.

    Raises:
        RuntimeError: in backward, where the gradients are differentiated once more (`create_graph=True`).
    """
    spec = CallSpec(*raw_spec)
    leaves = tuple(_connected(x, position in spec.wanted) for position, x in enumerate(leaves))
    operands = leaves[: len(leaves) - spec.projections]
    with without_autocast():
        if spec.backward == "in_forward":
            return _GradientsInForward.apply(backward, backward_tail, spec, *operands)
        if spec.backward == "none" or spec.sums or not torch.is_grad_enabled():
            return mini_sequence_loop(forward, forward_tail, spec.forward_spec, *operands)
        bodies = (forward, forward_tail, backward, backward_tail)
        return _Recompute.apply(bodies, spec, *leaves)


def with_gradients(
    backward: Any, backward_tail: Any, raw_spec: tuple[Any, ...], *values: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Return sums that are made of the results of a loop; their gradients go through its backward loop.

    So do those of the weights that the sums are made with: a chunk has its own rows of them.

    Args:
        backward: as in `mini_sequence`.
        backward_tail: as in `mini_sequence`.
        raw_spec: a `CallSpec` as a tuple.
        values: the sums, the results that the backward loop reads, then the leaves of `mini_sequence`.

    Raises:
        RuntimeError: in backward, where the gradients are differentiated once more (`create_graph=True`).
    """
    spec = CallSpec(*raw_spec)
    before = len(spec.differentiable) + len(spec.reused)
    leaves = [_connected(x, position in spec.wanted) for position, x in enumerate(values[before:])]
    if spec.backward == "none" or not torch.is_grad_enabled():
        return values[: len(spec.differentiable)]
    read = [_connected(x, wanted=False) for x in values[:before]]
    return _BackwardOfSums.apply((backward, backward_tail), spec, *read, *leaves)


def _connected(operand: torch.Tensor, wanted: bool) -> torch.Tensor:
    """Detach an operand whose gradient is not wanted: autograd would pass on zeros for it."""
    return operand if wanted or not operand.requires_grad else operand.detach()


class _Recompute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, bodies: tuple[Any, ...], spec: CallSpec, *leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.bodies, ctx.spec, ctx.count = bodies[2:], spec, len(leaves)
        operands = leaves[: len(leaves) - spec.projections]
        with results_saved() if spec.saves_results else nullcontext():
            results = mini_sequence_loop(*bodies[:2], spec.forward_spec, *operands)
        ctx.save_for_backward(*(results[i] for i in spec.reused), *operands)
        ctx.mark_non_differentiable(*(r for i, r in enumerate(results) if i not in spec.differentiable))
        return results

    @staticmethod
    def backward(ctx: Any, *tangents: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        spec: CallSpec = ctx.spec
        upstream = [tangents[i] for i in spec.differentiable]
        _forbid_second_derivatives()
        with without_autocast():
            grads = mini_sequence_loop(*ctx.bodies, spec.backward_spec, *upstream, *ctx.saved_tensors)
        return (None, None, *_at_operands(spec, grads, ctx.count))


class _BackwardOfSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, bodies: tuple[Any, ...], spec: CallSpec, *values: torch.Tensor) -> tuple[torch.Tensor, ...]:
        sums = len(spec.differentiable)
        ctx.bodies, ctx.spec, ctx.count = bodies, spec, len(values) - sums - len(spec.reused)
        ctx.save_for_backward(*values[sums : len(values) - spec.projections])
        return tuple(x.view_as(x) for x in values[:sums])

    @staticmethod
    def backward(ctx: Any, *tangents: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        spec: CallSpec = ctx.spec
        _forbid_second_derivatives()
        with without_autocast():
            grads = mini_sequence_loop(*ctx.bodies, spec.backward_spec, *tangents, *ctx.saved_tensors)
        read = [None] * (len(spec.differentiable) + len(spec.reused))
        return (None, None, *read, *_at_operands(spec, grads, ctx.count))


class _GradientsInForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, full: Any, tail: Any, spec: CallSpec, *operands: torch.Tensor) -> tuple[torch.Tensor, ...]:
        outs = mini_sequence_loop(full, tail, spec.backward_spec, *operands)
        results, grads = outs[: -len(spec.wanted)], outs[-len(spec.wanted) :]
        ctx.save_for_backward(*grads)
        ctx.spec, ctx.count = spec, len(operands)
        ctx.dtypes = [operands[i].dtype for i in spec.wanted]
        ctx.mark_non_differentiable(*(r for i, r in enumerate(results) if i not in spec.differentiable))
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *tangents: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        factor = tangents[ctx.spec.differentiable[0]]
        _forbid_second_derivatives()
        pairs = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        grads = tuple(_scaled(grad, factor, dtype) for grad, dtype in pairs)
        return (None, None, None, *_at_operands(ctx.spec, grads, ctx.count))


def _forbid_second_derivatives() -> None:
    """Raise an error where gradients are to be differentiated (`create_graph=True`): no body computes that.

    The error comes at once: a gradient that is only returned reaches no op that could raise it later.

    Raises:
        RuntimeError: grad mode is on in backward.
    """
    if torch.is_grad_enabled():
        raise RuntimeError("mst_fx: gradients of a loop cannot be differentiated once more (create_graph=True)")


def _scaled(grad: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Multiply a gradient by the upstream factor; 0 stays 0, as without any label the factor is infinite.

    This is the first rounding of a float32 sum.
    """
    return torch.where(grad == 0, grad, grad * factor).to(dtype)


def _at_operands(spec: CallSpec, grads: tuple[torch.Tensor, ...], count: int) -> list[torch.Tensor | None]:
    """Return the gradients at the positions of their operands, None elsewhere."""
    by_operand = dict(zip(spec.wanted, grads, strict=True))
    return [by_operand.get(position) for position in range(count)]
