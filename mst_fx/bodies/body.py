"""Stages -> the aten bodies of one chunk: one computes its outputs, the other its gradients.

A trace records a run of the loop's nodes on fake operands of one chunk; the chunk's sizes replace those that a node
names. The body of the gradients is the VJP of the same run, so it is right by construction. Each shape is compared with
the one that its placement says.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.fx import GraphModule, Node

from mst_fx.bodies.chunk import axis_of, chunk_inputs, computed, merged
from mst_fx.bodies.factors import take_out_products
from mst_fx.capture.lower import trace
from mst_fx.core.config import Accumulate
from mst_fx.core.values import HALF
from mst_fx.kernels.write_order import products_late
from mst_fx.placement.partition import Stages
from mst_fx.placement.placement import adds_up
from mst_fx.runtime.result_kinds import Cat, ResultKind, Sum


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
        wanted: positions of the loop's leaves that need a gradient.
        differentiable: positions of the loop's ends that have one.
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


def forward_body(stages: Stages, length: int | None, *, factored: bool = True) -> Body:
    """Trace the body that computes the outputs of one chunk.

    Args:
        stages: the stages of the region.
        length: positions of the chunk; None for a body that takes any number of them.
        factored: whether matrix products at its end move out (see `factors`).
    """

    def run(*chunks: torch.Tensor) -> tuple[torch.Tensor, ...]:
        env = computed(stages, merged(stages, stages.operands, chunks))
        return tuple(env[node] for node in stages.results)

    module = trace(run, partial(chunk_inputs, stages, stages.operands), length, stages.values)
    kinds = [_result_kind(stages, node) for node in stages.results]
    return _finished(module, kinds, factored)


def gradient_body(stages: Stages, gradients: Gradients, length: int | None, *, factored: bool = True) -> Body:
    """Trace the body that computes gradients of one chunk; it takes upstream gradients, reused results, and operands.

    Args:
        stages: the stages of the region.
        gradients: the gradients to compute.
        length: positions of the chunk; None for a body that takes any number of them.
        factored: whether matrix products at its end move out (see `factors`).
    """
    upstream = [] if gradients.in_forward else [stages.ends[i] for i in gradients.differentiable]
    reused = [stages.results[i] for i in gradients.reused]
    inputs = [*upstream, *reused, *stages.operands]

    def run(*chunks: torch.Tensor) -> tuple[torch.Tensor, ...]:
        given = iter(merged(stages, inputs, chunks))
        tangents = [next(given) for _ in upstream]
        known = {node: next(given) for node in reused}
        operands = [x.detach() for x in given]
        env = computed(stages, operands, known, gradients.wanted)
        leaves = [env[stages.leaves[i]] for i in gradients.wanted]
        results = [env[node] for node in stages.results]
        sinks = [env[stages.ends[i]] for i in gradients.differentiable]
        seeds = [torch.ones_like(sink) for sink in sinks] if gradients.in_forward else tangents
        grads = torch.autograd.grad(sinks, leaves, seeds, materialize_grads=True)
        return (*results, *grads) if gradients.in_forward else grads

    module = trace(run, partial(chunk_inputs, stages, inputs), length, stages.values)
    products_late(module)
    kinds = [_result_kind(stages, node) for node in stages.results] if gradients.in_forward else []
    kinds += [_gradient_kind(stages, stages.leaves[i], gradients) for i in gradients.wanted]
    return _finished(module, kinds, factored)


def _finished(module: GraphModule, kinds: Sequence[ResultKind], factored: bool) -> Body:
    if factored:
        return Body(module, take_out_products(module, kinds))
    module.recompile()
    return Body(module, tuple(kinds))


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
