"""Stages -> the aten bodies of one mini-sequence: its results, or its gradients.

A body is made by running the loop's nodes on fake operands of one chunk, with the sizes that a node names replaced by
the chunk's, and by tracing that run. The body of the gradients is the VJP of the same run, so it is right by
construction. Every shape is compared with what its placement says.

A weight's gradient that ends in a matrix product leaves the body as its two factors: the runtime multiplies them into
one accumulator, so no gradient of a single chunk ever exists.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.fx import GraphModule, Node, map_arg

from mst_fx.config import Accumulate
from mst_fx.loop import Axis, axis_length
from mst_fx.lower import hint, on_fakes, trace
from mst_fx.placement import PARTIAL, Split, sure
from mst_fx.rules.creation import FILLS
from mst_fx.rules.view import RESHAPES, dim_of
from mst_fx.stages import Stages

aten = torch.ops.aten
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
    """

    wanted: tuple[int, ...]
    differentiable: tuple[int, ...]
    in_forward: bool
    accumulate: Accumulate


def axis_of(stages: Stages, node: Node) -> Axis | None:
    """The `ins` entry of an operand."""
    placement = stages.placement(node)
    return (placement.dim, placement.outer, placement.inner) if isinstance(placement, Split) else None


def forward_body(stages: Stages, length: int | None) -> Body:
    """The body that computes the results of `length` positions, of any number of them for None."""

    def run(*operands: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return _run_chunk(stages, operands)

    module = trace(run, partial(_chunk_inputs, stages, stages.operands), length)
    return Body(module, tuple(_result_kind(stages, node) for node in stages.results))


def gradient_body(stages: Stages, length: int | None, gradients: Gradients) -> Body:
    """The body that computes gradients; its inputs are upstream gradients, then operands. Length as above."""
    upstream = [] if gradients.in_forward else [stages.results[i] for i in gradients.differentiable]

    def run(*inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        tangents, operands = inputs[: len(upstream)], [x.detach() for x in inputs[len(upstream) :]]
        leaves = [operands[i].requires_grad_() for i in gradients.wanted]
        results = _run_chunk(stages, operands)
        sinks = [results[i] for i in gradients.differentiable]
        seeds = [torch.ones_like(sink) for sink in sinks] if gradients.in_forward else tangents
        grads = torch.autograd.grad(sinks, leaves, seeds, materialize_grads=True)
        return (*results, *grads) if gradients.in_forward else grads

    module = trace(run, partial(_chunk_inputs, stages, [*upstream, *stages.operands]), length)
    own = tuple(_result_kind(stages, node) for node in stages.results) if gradients.in_forward else ()
    axes = [axis_of(stages, stages.operands[i]) for i in gradients.wanted]
    kinds = _take_out_products(module, len(own), axes, gradients.accumulate)
    return Body(module, own + kinds)


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


def _run_chunk(stages: Stages, operands: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    length = axis_length([axis_of(stages, node) for node in stages.operands], operands)
    env: dict[Node, Any] = dict(zip(stages.operands, operands, strict=True))
    for node in stages.loop:
        env[node] = _run_node(stages, node, length, env)
        placement = stages.placements.of[node]
        if isinstance(placement, Split):
            expected = placement.chunk_shape(node.meta["val"].shape, length)
            if not all(sure(a == b) for a, b in zip(env[node].shape, expected, strict=True)):
                raise AssertionError(f"{node.target} gave {list(env[node].shape)}, its placement says {expected}")
    return tuple(env[node] for node in stages.results)


def _run_node(stages: Stages, node: Node, length: int, env: dict[Node, Any]) -> Any:
    args: Any
    args, kwargs = map_arg((node.args, node.kwargs), env.get)  # a size of the whole is not there, and not read
    placement = stages.placements.of[node]
    target: Any = node.target
    if not isinstance(placement, Split):
        return target(*args, **kwargs)
    sizes = placement.chunk_shape(node.meta["val"].shape, length)
    if target in RESHAPES:
        return args[0].reshape(sizes)
    if target == aten.expand.default:
        return args[0].expand(sizes)
    if target in FILLS:
        position = FILLS[target]
        return target(*args[:position], sizes, *args[position + 1 :], **kwargs)
    if target == aten.slice.Tensor and dim_of(node, 1) == placement.dim:
        return args[0]  # a full slice: the rule allows no other
    return target(*args, **kwargs)


def _result_kind(stages: Stages, node: Node) -> tuple[Any, ...]:
    axis = axis_of(stages, node)
    if axis is not None:
        return ("cat", *axis)
    assert stages.placements.of[node] == PARTIAL
    return ("sum", _accumulator(node.meta["val"].dtype, "float32"))


def _accumulator(dtype: torch.dtype, accumulate: Accumulate) -> torch.dtype:
    return torch.float32 if dtype in HALF and accumulate == "float32" else dtype


def _take_out_products(
    module: GraphModule, own: int, axes: Sequence[Axis | None], accumulate: Accumulate
) -> tuple[tuple[Any, ...], ...]:
    """Replace gradients of whole operands by the factors of their last product; tell how each one adds up."""
    (output,) = (node for node in module.graph.nodes if node.op == "output")
    outputs: list[Node] = list(output.args[0])
    kept = outputs[:own]
    kinds: list[tuple[Any, ...]] = []
    for grad, axis in zip(outputs[own:], axes, strict=True):
        dtype = grad.meta["val"].dtype
        factors = _factors(grad)
        if axis is not None:
            kept.append(grad)
            kinds.append(("cat", *axis))
        elif factors is not None:
            kept.extend(factors)
            kinds.append(("outer", _accumulator(dtype, accumulate), dtype))
        else:
            kept.append(grad)
            kinds.append(("sum", _accumulator(dtype, accumulate)))
    output.args = (tuple(kept),)
    module.graph.eliminate_dead_code()
    module.graph.lint()
    module.recompile()
    return tuple(kinds)


def _factors(grad: Node) -> tuple[Node, Node] | None:
    """A and B with grad = A^T B, None where the gradient does not end in a matrix product."""
    transposed = False
    while grad.target in (aten.t.default, aten.detach.default):
        transposed ^= grad.target == aten.t.default
        (source,) = grad.all_input_nodes
        grad = source
    if grad.target != aten.mm.default:
        return None
    left, right = grad.args
    assert isinstance(left, Node)
    assert isinstance(right, Node)
    if transposed:  # (left right)^T = right^T left^T
        return right, _t(left, grad)
    return _t(left, grad), right


def _t(node: Node, before: Node) -> Node:
    """The transpose of a matrix; the operand itself where the matrix is a transpose already."""
    if node.target == aten.t.default:
        source = node.args[0]
        assert isinstance(source, Node)
        return source
    graph = node.graph
    with graph.inserting_before(before):
        transposed = graph.call_function(aten.t.default, (node,))
    transposed.meta["val"] = node.meta["val"].t()
    return transposed
