"""Stages -> the aten bodies of one chunk: one computes its outputs, the other its gradients.

A trace records a run of the loop's nodes on fake operands of one chunk; the chunk's sizes replace those that a node
names. The body of the gradients is the VJP of the same run, so it is right by construction. Each shape is compared with
the one that its placement says.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.fx import Graph, GraphModule, Node, map_arg

from mst_fx.bodies.derivatives import reads_log_softmax, run_on_logits
from mst_fx.bodies.factors import take_out_products
from mst_fx.bodies.log_softmax import reduces_wide_rows, run_in_tiles
from mst_fx.bodies.stand_in import literals_of, traced_at_stand_in, with_length
from mst_fx.capture.lower import trace
from mst_fx.core.config import Accumulate
from mst_fx.core.graph_modules import copied
from mst_fx.core.sizes import is_symbolic, sure
from mst_fx.core.values import HALF
from mst_fx.kernels.write_order import products_late
from mst_fx.ops.overwritten import overwritten
from mst_fx.ops.own_gradients import backward_of, own_gradients, own_of, with_own_gradients
from mst_fx.placement.partition import Stages
from mst_fx.placement.placement import Split, adds_up, split_of
from mst_fx.placement.run_on_chunk import run_resized
from mst_fx.runtime.loop_operator import axis_length
from mst_fx.runtime.result_kinds import Axis, Cat, ResultKind, Sum
from mst_fx.runtime.results import example


@dataclass(frozen=True)
class Body:
    """The aten graph of one chunk, and how its outputs become results.

    Attributes:
        module: the aten graph.
        outs: the kind of each result; one result may take several outputs.
    """

    module: GraphModule
    outs: tuple[ResultKind, ...]

    @property
    def literals(self) -> tuple[tuple[Any, ...], ...]:
        """The argument `outs` of the loop operator."""
        return tuple(kind.literal for kind in self.outs)


@dataclass(frozen=True)
class Gradients:
    """The gradients that a body computes.

    Attributes:
        wanted: positions of the loop's operands that need a gradient.
        differentiable: positions of the loop's results that have one.
        in_forward: whether the body computes the results, too, with 1 as the upstream gradient.
        accumulate: dtype policy for gradients of whole operands in half precision.
        reused: positions of the loop's results that the body reads and does not recompute.
        cast: whether a gradient that adds up is returned in the dtype of its operand, and not in that of the sum.
    """

    wanted: tuple[int, ...]
    differentiable: tuple[int, ...]
    in_forward: bool
    accumulate: Accumulate
    reused: tuple[int, ...] = ()
    cast: bool = True


def axis_of(stages: Stages, node: Node) -> Axis | None:
    """Return the entry of an operand in `ins` of the loop operator: (dim, outer, inner), None for a whole one."""
    placement = stages.placement(node)
    return (placement.dim, placement.outer, placement.inner) if isinstance(placement, Split) else None


def strides_of(stages: Stages) -> tuple[tuple[int, tuple[int, ...]], ...]:
    """Return (position, strides) of each whole operand that is not contiguous: `strides` of the loop operator.

    A copy cannot take a layout that is known only at run time, or in which elements share memory: such an operand is
    read as contiguous memory, and has no entry.
    """
    found = []
    for position, node in enumerate(stages.operands):
        value: torch.Tensor = node.meta["val"]
        literal = axis_of(stages, node) is None and not any(map(is_symbolic, (*value.shape, *value.stride())))
        if literal and not value.is_contiguous() and _has_own_elements(value):
            found.append((position, tuple(map(int, value.stride()))))
    return tuple(found)


def _has_own_elements(value: torch.Tensor) -> bool:
    """Return whether no two elements share memory."""
    reach = 1
    for stride, size in sorted((stride, size) for stride, size in zip(value.stride(), value.shape, strict=True)):
        if size > 1 and stride < reach:
            return False
        reach = max(reach, stride * (size - 1) + 1)
    return True


def forward_body(stages: Stages, length: int | None, *, factored: bool = True) -> Body:
    """Trace the body that computes the outputs of one chunk.

    Args:
        stages: the stages of the region.
        length: positions of the chunk; None for a body that takes any number of them.
        factored: whether matrix products at its end move out (see `factors`).
    """

    def run(*chunks: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return _run_chunk(stages, merged(stages, stages.operands, chunks))

    kinds = [_result_kind(stages, node) for node in stages.results]
    return _body(_Trace(stages, stages.operands, run), kinds, length, factored)


def gradient_body(stages: Stages, gradients: Gradients, length: int | None, *, factored: bool = True) -> Body:
    """Trace the body that computes gradients of one chunk; it takes upstream gradients, reused results, and operands.

    Args:
        stages: the stages of the region.
        gradients: the gradients to compute.
        length: positions of the chunk; None for a body that takes any number of them.
        factored: whether matrix products at its end move out (see `factors`).
    """
    upstream = [] if gradients.in_forward else [stages.results[i] for i in gradients.differentiable]
    reused = [stages.results[i] for i in gradients.reused]
    inputs = [*upstream, *reused, *stages.operands]

    def run(*chunks: torch.Tensor) -> tuple[torch.Tensor, ...]:
        given = iter(merged(stages, inputs, chunks))
        tangents = [next(given) for _ in upstream]
        known = {node: next(given) for node in reused}
        operands = [x.detach() for x in given]
        leaves = [operands[i].requires_grad_() for i in gradients.wanted]
        results = _run_chunk(stages, operands, known)
        sinks = [results[i] for i in gradients.differentiable]
        seeds = [torch.ones_like(sink) for sink in sinks] if gradients.in_forward else tangents
        grads = torch.autograd.grad(sinks, leaves, seeds, materialize_grads=True)
        return (*results, *grads) if gradients.in_forward else grads

    kinds = [_result_kind(stages, node) for node in stages.results] if gradients.in_forward else []
    kinds += [_gradient_kind(stages, stages.operands[i], gradients) for i in gradients.wanted]
    which = (gradients.wanted, gradients.differentiable, gradients.in_forward, gradients.reused)
    return _body(_Trace(stages, inputs, run, which), kinds, length, factored)


@dataclass(frozen=True)
class _Trace:
    """What a body is traced from.

    Attributes:
        stages: the stages of the region.
        inputs: operands, results, and results whose gradients it takes.
        run: computes the outputs of a chunk.
        which: the gradients that it computes; None where it computes results alone.
    """

    stages: Stages
    inputs: Sequence[Node]
    run: Callable[..., tuple[torch.Tensor, ...]]
    which: Hashable = None

    def at(self, length: int | None) -> GraphModule:
        """Trace it for one length, or with a symbol for all."""
        return self._in_order(trace(self.run, partial(chunk_inputs, self.stages, self.inputs), length))

    def at_stand_in(self) -> GraphModule | None:
        """Trace it for all lengths, once; None where each length needs a trace of its own."""
        known = _at_stand_in.setdefault(self.stages.graph, {})
        key = (self.stages.axis, *self.inputs, self.stages.results, self.which)
        if key not in known:
            literals = literals_of((*self.stages.loop, *self.stages.backward))
            module = traced_at_stand_in(self.run, partial(chunk_inputs, self.stages, self.inputs), literals)
            known[key] = module and self._in_order(module)
        return known[key]

    def _in_order(self, module: GraphModule) -> GraphModule:
        if self.which is not None:
            products_late(module)
        return module


_at_stand_in: WeakKeyDictionary[Graph, dict[Hashable, GraphModule | None]] = WeakKeyDictionary()


def _body(traced: _Trace, kinds: Sequence[ResultKind], length: int | None, factored: bool) -> Body:
    for_all = traced.at_stand_in()
    module = copied(for_all) if for_all is not None else traced.at(length)
    outs = take_out_products(module, kinds) if factored else tuple(kinds)
    if for_all is not None:
        with_length(module, length)
    module.recompile()
    return Body(module, outs)


def chunk_inputs(stages: Stages, nodes: Sequence[Node], length: int) -> list[torch.Tensor]:
    """Return examples of what the loop hands to a body for operands, results, and gradients of results."""
    layouts = {stages.operands[position]: strides for position, strides in strides_of(stages)}
    return [example(node.meta["val"], axis_of(stages, node), length, layouts.get(node)) for node in nodes]


def merged(stages: Stages, nodes: Sequence[Node], chunks: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return chunks in the shapes of the graph; a body takes them with the axis as a dim of its own."""
    shaped = list(chunks)
    for position, (node, chunk) in enumerate(zip(nodes, chunks, strict=True)):
        split = stages.placement(node)
        if isinstance(split, Split) and (split.outer, split.inner) != (1, 1):
            length = chunk.shape[split.dim + (split.outer != 1)]
            shaped[position] = chunk.view(split.chunk_shape(node.meta["val"].shape, length))
    return shaped


class _Known(torch.autograd.Function):
    """Replace a value computed from the operands by one that is known; gradients go to the operands.

    Ops that only computed the value become dead code.
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
    env = computed(stages, operands, known)
    return tuple(env[node] for node in stages.results)


def computed(
    stages: Stages, operands: Sequence[torch.Tensor], known: Mapping[Node, torch.Tensor] | None = None
) -> dict[Node, Any]:
    """Run the loop's nodes on one chunk; return the values of operands and nodes."""
    length = axis_length([axis_of(stages, node) for node in stages.operands], operands)
    env: dict[Node, Any] = dict(zip(stages.operands, operands, strict=True))
    inside = set(stages.loop)

    def run(node: Node, env: Mapping[Node, Any]) -> Any:
        value = run_resized(node, stages.placements.of[node], length, env)
        _check_shape(stages, node, value, length)
        return value

    for node in stages.loop:
        if node.target == overwritten:
            env[node] = _Known.apply(*map_arg(node.args, env.get))
        elif node.target == own_gradients:
            values, inputs = (list(map(env.__getitem__, nodes)) for nodes in own_of(node)[:2])
            env[node] = with_own_gradients(values, inputs, backward_of(node, stages.backward, env, run))
        elif reads_log_softmax(node, inside):
            env[node] = run_on_logits(node, env)
        elif reduces_wide_rows(node):
            env[node] = run_in_tiles(node, env)
        else:
            env[node] = run(node, env)
        if known and node in known:
            env[node] = _Known.apply(env[node], known[node])
        _check_shape(stages, node, env[node], length)
    return env


def _check_shape(stages: Stages, node: Node, value: Any, length: int) -> None:
    """Raise an error unless a value has the shape that its placement says."""
    split = split_of(stages.placements.of[node])
    if split is not None:
        expected = split.chunk_shape(node.meta["val"].shape, length)
        if not all(sure(a == b) for a, b in zip(value.shape, expected, strict=True)):
            raise AssertionError(f"{node.target} gave {list(value.shape)}, its placement says {expected}")


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
