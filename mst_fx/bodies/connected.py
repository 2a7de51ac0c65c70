"""Which operands and results of a loop have a gradient: a run of its nodes on one chunk, under autograd, tells."""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch.fx import Node
from torch.utils._pytree import tree_leaves

from mst_fx.bodies.chunk import chunk_inputs, computed, merged
from mst_fx.capture.lower import on_fakes
from mst_fx.core.aten_ops import WITHOUT_GRADIENT
from mst_fx.core.refusal import Reason, Refusal
from mst_fx.core.sizes import hint
from mst_fx.ops.overwritten import overwritten
from mst_fx.placement.partition import Stages


def connected(
    stages: Stages, wanted: Sequence[int], reached: Container[Node]
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return which gradients exist, in the loop as in eager execution: a count has none, nor has a detached value.

    Args:
        stages: the stages of the region.
        wanted: positions of the loop's leaves that need a gradient.
        reached: ends that a gradient may come back from.

    Returns:
        Positions of the leaves that get a gradient, and of the ends that have one.

    Raises:
        Refusal: a gradient would have to come back through an op that torch cannot differentiate (UNKNOWN_OP).
    """

    def run(*chunks: torch.Tensor) -> tuple[tuple[int, ...], tuple[int, ...]]:
        operands = merged(stages, stages.operands, chunks)
        env = computed(stages, operands, wanted=wanted)
        leaves = [env[stages.leaves[position]] for position in wanted]
        values = [env[node] for node in stages.ends]
        ends = [i for i, x in enumerate(values) if x.requires_grad and stages.ends[i] in reached]
        _forbid_missing_derivatives(env, [values[i] for i in ends])
        stops = bool(stages.projections) or any(map(_stops_gradients, stages.loop))
        if not ends or not stops:
            return (tuple(wanted) if ends else ()), tuple(ends)
        sinks = [values[i] for i in ends]
        grads = torch.autograd.grad(sinks, leaves, [torch.ones_like(x) for x in sinks], allow_unused=True)
        return tuple(i for i, grad in zip(wanted, grads, strict=True) if grad is not None), tuple(ends)

    return on_fakes(run, partial(chunk_inputs, stages, stages.operands), hint(stages.length), stages.values)


def _forbid_missing_derivatives(env: Mapping[Node, Any], sinks: Sequence[torch.Tensor]) -> None:
    """Raise a refusal for an op without a derivative on the way back from the sinks."""
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


def _stops_gradients(node: Node) -> bool:
    """Return whether an op gives its operand no gradient though that may need one: a permutation has none."""
    made = all(map(_is_floating, tree_leaves(node.meta.get("val"))))
    reads = any(_is_floating(operand.meta.get("val")) for operand in node.all_input_nodes)
    return reads and (not made or node.target in (overwritten, *WITHOUT_GRADIENT))


def _is_floating(value: object) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()
