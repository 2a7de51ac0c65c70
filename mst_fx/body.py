"""Stages -> the aten bodies of one mini-sequence: its results, or its gradients.

A body is made by running the loop's nodes on fake operands of one chunk, with the sizes that a node names replaced by
the chunk's, and by tracing that run. The body of the gradients is the VJP of the same run, so it is right by
construction. Every shape is compared with what its placement says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.fx import GraphModule, Node

from mst_fx.config import Accumulate
from mst_fx.derivatives import reads_log_softmax, run_on_logits
from mst_fx.log_softmax import reduces_wide_rows, run_in_parts
from mst_fx.loop import axis_length
from mst_fx.lower import hint, on_fakes, trace
from mst_fx.overwriting import products_late
from mst_fx.placement import Split, adds_up, split_of, sure
from mst_fx.products import take_out_products
from mst_fx.resize import run_resized
from mst_fx.results import Axis
from mst_fx.stages import Stages

HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Body:
    """One chunk's computation and how its outputs become results (`outs` of the loop operator)."""

    module: GraphModule
    outs: tuple[tuple[Any, ...], ...]


@dataclass(frozen=True)
class Gradients:
    """What the gradient body shall compute.

    Attributes:
        wanted: positions of the loop's operands that need a gradient.
        differentiable: positions of the loop's results that have one.
        in_forward: compute the results too, with 1 as the upstream gradient.
        accumulate: dtype policy for gradients of whole operands in half precision.
        kept: positions of the loop's results that are given, and not computed again.
        cast: whether what adds up is returned in the dtype of its operand, and not in the one it adds up in.
    """

    wanted: tuple[int, ...]
    differentiable: tuple[int, ...]
    in_forward: bool
    accumulate: Accumulate
    kept: tuple[int, ...] = ()
    cast: bool = True


def axis_of(stages: Stages, node: Node) -> Axis | None:
    """The `ins` entry of an operand."""
    placement = stages.placement(node)
    return (placement.dim, placement.outer, placement.inner) if isinstance(placement, Split) else None


def forward_body(stages: Stages, length: int | None) -> Body:
    """The body that computes the results of `length` positions, of any number of them for None."""

    def run(*operands: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return _run_chunk(stages, operands)

    module = trace(run, partial(_chunk_inputs, stages, stages.operands), length)
    return Body(module, take_out_products(module, [_result_kind(stages, node) for node in stages.results]))


def gradient_body(stages: Stages, gradients: Gradients, length: int | None) -> Body:
    """The body that computes gradients; its inputs are upstream gradients, kept results, operands. Length as above."""
    upstream = [] if gradients.in_forward else [stages.results[i] for i in gradients.differentiable]
    kept = [stages.results[i] for i in gradients.kept]

    def run(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        given = iter(inputs)
        tangents = [next(given) for _ in upstream]
        known = {node: next(given) for node in kept}
        operands = [x.detach() for x in given]
        leaves = [operands[i].requires_grad_() for i in gradients.wanted]
        results = _run_chunk(stages, operands, known)
        sinks = [results[i] for i in gradients.differentiable]
        seeds = [torch.ones_like(sink) for sink in sinks] if gradients.in_forward else tangents
        grads = torch.autograd.grad(sinks, leaves, seeds, materialize_grads=True)
        return (*results, *grads) if gradients.in_forward else grads

    module = trace(run, partial(_chunk_inputs, stages, [*upstream, *kept, *stages.operands]), length)
    products_late(module)
    kinds = [_result_kind(stages, node) for node in stages.results] if gradients.in_forward else []
    kinds += [_gradient_kind(stages, stages.operands[i], gradients) for i in gradients.wanted]
    return Body(module, take_out_products(module, kinds))


def differentiable_results(stages: Stages, wanted: Sequence[int]) -> tuple[int, ...]:
    """Positions of the loop's results that have a gradient when the operands at `wanted` do; a count has none."""

    def run(*operands: torch.Tensor) -> tuple[int, ...]:
        for position in wanted:
            operands[position].requires_grad_()
        results = _run_chunk(stages, operands)
        return tuple(position for position, result in enumerate(results) if result.requires_grad)

    return on_fakes(run, partial(_chunk_inputs, stages, stages.operands), hint(stages.length))


def _chunk_inputs(stages: Stages, nodes: Sequence[Node], length: int) -> list[torch.Tensor]:
    inputs = []
    for node in nodes:
        value, placement = node.meta["val"], stages.placement(node)
        if isinstance(placement, Split):
            shape = placement.chunk_shape(value.shape, length)
            inputs.append(torch.empty(shape, dtype=value.dtype, device=value.device))
        else:
            inputs.append(torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device))
    return inputs


class _Known(torch.autograd.Function):
    """A value that is there already, in place of one computed from the operands; gradients go to the operands.

    What computed it and nothing else is dead code.
    """

    @staticmethod
    def forward(ctx: Any, computed: torch.Tensor, known: torch.Tensor) -> torch.Tensor:
        return known.view_as(known)

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grad, None


def _run_chunk(
    stages: Stages, operands: Sequence[torch.Tensor], known: Mapping[Node, torch.Tensor] | None = None
) -> tuple[torch.Tensor, ...]:
    length = axis_length([axis_of(stages, node) for node in stages.operands], operands)
    env: dict[Node, Any] = dict(zip(stages.operands, operands, strict=True))
    inside = set(stages.loop)
    for node in stages.loop:
        placement = stages.placements.of[node]
        if reads_log_softmax(node, inside):
            env[node] = run_on_logits(node, env)
        elif reduces_wide_rows(node):
            env[node] = run_in_parts(node, env)
        else:
            env[node] = run_resized(node, placement, length, env)
        if known and node in known:
            env[node] = _Known.apply(env[node], known[node])
        split = split_of(placement)
        if split is not None:
            expected = split.chunk_shape(node.meta["val"].shape, length)
            if not all(sure(a == b) for a, b in zip(env[node].shape, expected, strict=True)):
                raise AssertionError(f"{node.target} gave {list(env[node].shape)}, its placement says {expected}")
    return tuple(env[node] for node in stages.results)


def _result_kind(stages: Stages, node: Node) -> tuple[Any, ...]:
    axis = axis_of(stages, node)
    if axis is not None:
        return ("cat", *axis)
    assert adds_up(stages.placements.of[node])
    dtype = node.meta["val"].dtype
    return ("sum", _accumulator(dtype, "float32"), dtype)


def _gradient_kind(stages: Stages, operand: Node, gradients: Gradients) -> tuple[Any, ...]:
    axis, dtype = axis_of(stages, operand), operand.meta["val"].dtype
    if axis is not None:
        return ("cat", *axis)
    adds_up_in = _accumulator(dtype, gradients.accumulate)
    return ("sum", adds_up_in, dtype if gradients.cast else adds_up_in)


def _accumulator(dtype: torch.dtype, accumulate: Accumulate) -> torch.dtype:
    return torch.float32 if dtype in HALF and accumulate == "float32" else dtype
