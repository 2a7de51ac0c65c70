"""Stages -> the aten bodies of one mini-sequence: its results, or its gradients.

A body is made by running the loop's nodes on fake operands of one chunk, with the sizes that a node names replaced by
the chunk's, and by tracing that run. The body of the gradients is the VJP of the same run, so it is right by
construction. Every shape is compared with what its placement says.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.fx import GraphModule, Node, map_arg
from torch.utils._pytree import tree_leaves

from mst_fx.bodies.derivatives import reads_log_softmax, run_on_logits
from mst_fx.bodies.factors import take_out_products
from mst_fx.bodies.log_softmax import reduces_wide_rows, run_in_parts
from mst_fx.capture.lower import on_fakes, trace
from mst_fx.core.aten_ops import WITHOUT_GRADIENT
from mst_fx.core.config import Accumulate
from mst_fx.core.refusal import Reason, Refusal
from mst_fx.core.sizes import hint, is_symbolic, sure
from mst_fx.core.values import HALF
from mst_fx.kernels.write_order import products_late
from mst_fx.ops.overwritten import overwritten
from mst_fx.placement.partition import Stages
from mst_fx.placement.placement import Split, adds_up, split_of
from mst_fx.placement.run_on_chunk import run_resized
from mst_fx.runtime.loop_operator import axis_length
from mst_fx.runtime.result_kinds import Axis, Cat, ResultKind, Sum
from mst_fx.runtime.results import example


@dataclass(frozen=True)
class Body:
    """One chunk's computation and how its outputs become results."""

    module: GraphModule
    outs: tuple[ResultKind, ...]

    @property
    def literals(self) -> tuple[tuple[Any, ...], ...]:
        """`outs` of the loop operator."""
        return tuple(kind.literal for kind in self.outs)


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


def strides_of(stages: Stages) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """Layouts of the whole operands that are not contiguous, as `strides` of the loop operator.

    One that is known at run time only, or in which elements share memory, is none that a copy could be brought to: such
    an operand is read as contiguous memory.
    """
    found = []
    for position, node in enumerate(stages.operands):
        value: torch.Tensor = node.meta["val"]
        literal = axis_of(stages, node) is None and not any(map(is_symbolic, (*value.shape, *value.stride())))
        if literal and not value.is_contiguous() and _has_own_elements(value):
            found.append((position, tuple(map(int, value.stride()))))
    return tuple(found)


def _has_own_elements(value: torch.Tensor) -> bool:
    """Whether no two elements share memory."""
    reach = 1
    for stride, size in sorted((stride, size) for stride, size in zip(value.stride(), value.shape, strict=True)):
        if size > 1 and stride < reach:
            return False
        reach = max(reach, stride * (size - 1) + 1)
    return True


def forward_body(stages: Stages, length: int | None, *, factored: bool = True) -> Body:
    """The body that computes the results of `length` positions, of any number of them for None.

    Args:
        stages: of the region.
        length: of the mini-sequence.
        factored: whether products at its end leave it (see `factors`).
    """

    def run(*pieces: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return _run_chunk(stages, _merged(stages, stages.operands, pieces))

    module = trace(run, partial(_chunk_inputs, stages, stages.operands), length)
    kinds = [_result_kind(stages, node) for node in stages.results]
    return _finished(module, kinds, factored)


def gradient_body(stages: Stages, gradients: Gradients, length: int | None, *, factored: bool = True) -> Body:
    """The body that computes gradients; its inputs are upstream gradients, kept results, operands. Else as above."""
    upstream = [] if gradients.in_forward else [stages.results[i] for i in gradients.differentiable]
    kept = [stages.results[i] for i in gradients.kept]
    inputs = [*upstream, *kept, *stages.operands]

    def run(*pieces: torch.Tensor) -> tuple[torch.Tensor, ...]:
        given = iter(_merged(stages, inputs, pieces))
        tangents = [next(given) for _ in upstream]
        known = {node: next(given) for node in kept}
        operands = [x.detach() for x in given]
        leaves = [operands[i].requires_grad_() for i in gradients.wanted]
        results = _run_chunk(stages, operands, known)
        sinks = [results[i] for i in gradients.differentiable]
        seeds = [torch.ones_like(sink) for sink in sinks] if gradients.in_forward else tangents
        grads = torch.autograd.grad(sinks, leaves, seeds, materialize_grads=True)
        return (*results, *grads) if gradients.in_forward else grads

    module = trace(run, partial(_chunk_inputs, stages, inputs), length)
    products_late(module)
    kinds = [_result_kind(stages, node) for node in stages.results] if gradients.in_forward else []
    kinds += [_gradient_kind(stages, stages.operands[i], gradients) for i in gradients.wanted]
    return _finished(module, kinds, factored)


def _finished(module: GraphModule, kinds: Sequence[ResultKind], factored: bool) -> Body:
    if factored:
        return Body(module, take_out_products(module, kinds))
    module.recompile()
    return Body(module, tuple(kinds))


def connected(
    stages: Stages, wanted: Sequence[int], reached: Container[Node]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Which gradients there are, in the loop as in eager execution: a count has none, nor has what is detached.

    Args:
        stages: of the region.
        wanted: positions of the loop's operands that need a gradient.
        reached: results that a gradient may come back from.

    Returns:
        Positions of the operands that get one, and of the results that have one.

    Raises:
        Refusal: a gradient would have to come back through an op that torch cannot differentiate.
    """

    def run(*pieces: torch.Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
        operands = _merged(stages, stages.operands, pieces)
        leaves = [operands[position].requires_grad_() for position in wanted]
        env = _computed(stages, operands)
        results = [env[node] for node in stages.results]
        ends = [i for i, x in enumerate(results) if x.requires_grad and stages.results[i] in reached]
        _forbid_missing_derivatives(env, [results[i] for i in ends])
        if not ends or not any(map(_cuts_gradients, stages.loop)):
            return (tuple(wanted) if ends else ()), tuple(ends)
        sinks = [results[i] for i in ends]
        grads = torch.autograd.grad(sinks, leaves, [torch.ones_like(x) for x in sinks], allow_unused=True)
        return tuple(i for i, grad in zip(wanted, grads, strict=True) if grad is not None), tuple(ends)

    return on_fakes(run, partial(_chunk_inputs, stages, stages.operands), hint(stages.length))


def _forbid_missing_derivatives(env: Mapping[Node, Any], sinks: Sequence[torch.Tensor]) -> None:
    """Raise a refusal for the first op without a derivative between the sinks and what they are made of."""
    missing = {
        value.grad_fn: node
        for node, values in env.items()
        for value in tree_leaves(values)
        if isinstance(value, torch.Tensor)
        and value.grad_fn is not None
        and value.grad_fn.name().endswith("NotImplemented")
    }
    pending: list[Any] = [sink.grad_fn for sink in sinks] if missing else []
    seen: set[Any] = {None}
    while pending:
        step = pending.pop()
        if step in missing:
            raise Refusal(Reason.UNKNOWN_OP, missing[step], f"{missing[step].target} has no derivative")
        if step not in seen:
            seen.add(step)
            pending += [before for before, _ in step.next_functions]


def _cuts_gradients(node: Node) -> bool:
    """Whether an operand that may need a gradient gets none from a value that is made of it: an order has none."""
    made = all(map(_is_floating, tree_leaves(node.meta.get("val"))))
    reads = any(_is_floating(operand.meta.get("val")) for operand in node.all_input_nodes)
    return reads and (not made or node.target in (overwritten, *WITHOUT_GRADIENT))


def _is_floating(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _chunk_inputs(stages: Stages, nodes: Sequence[Node], length: int) -> list[torch.Tensor]:
    """What the loop hands to a body for these operands and results (upstream gradients are like these)."""
    layouts = {stages.operands[position]: strides for position, strides in strides_of(stages)}
    return [example(node.meta["val"], axis_of(stages, node), length, layouts.get(node)) for node in nodes]


def _merged(stages: Stages, nodes: Sequence[Node], pieces: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Mini-sequences in the shapes of the graph, from those in which a body takes them."""
    merged = list(pieces)
    for position, (node, piece) in enumerate(zip(nodes, pieces, strict=True)):
        split = stages.placement(node)
        if isinstance(split, Split) and (split.outer, split.inner) != (1, 1):
            length = piece.shape[split.dim + (split.outer != 1)]
            merged[position] = piece.view(split.chunk_shape(node.meta["val"].shape, length))
    return merged


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
    env = _computed(stages, operands, known)
    return tuple(env[node] for node in stages.results)


def _computed(
    stages: Stages, operands: Sequence[torch.Tensor], known: Mapping[Node, torch.Tensor] | None = None
) -> dict[Node, Any]:
    """The values of one mini-sequence."""
    length = axis_length([axis_of(stages, node) for node in stages.operands], operands)
    env: dict[Node, Any] = dict(zip(stages.operands, operands, strict=True))
    inside = set(stages.loop)
    for node in stages.loop:
        placement = stages.placements.of[node]
        if node.target == overwritten:
            env[node] = _Known.apply(*map_arg(node.args, env.get))
        elif reads_log_softmax(node, inside):
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
    return env


def _result_kind(stages: Stages, node: Node) -> ResultKind:
    axis = axis_of(stages, node)
    if axis is not None:
        return Cat(*axis)
    assert adds_up(stages.placements.of[node])
    dtype = node.meta["val"].dtype
    return Sum(_accumulator(dtype, "float32"), dtype)


def _gradient_kind(stages: Stages, operand: Node, gradients: Gradients) -> ResultKind:
    axis, dtype = axis_of(stages, operand), operand.meta["val"].dtype
    if axis is not None:
        return Cat(*axis)
    adds_up_in = _accumulator(dtype, gradients.accumulate)
    return Sum(adds_up_in, dtype if gradients.cast else adds_up_in)


def _accumulator(dtype: torch.dtype, accumulate: Accumulate) -> torch.dtype:
    return torch.float32 if dtype in HALF and accumulate == "float32" else dtype
