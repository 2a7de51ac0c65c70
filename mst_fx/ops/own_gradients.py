"""Functions that bring gradients of their own: straight-through estimators, clipped gradients, packed weights.

The gradients are not the derivative of what the function computes. A graph of aten ops holds both side by side:

    value     = ...                            the ops of the function's forward
    gradient  = ... upstream(value) ...        the ops of its backward
    (result,) = own_gradients([value], [operand], [gradient])

`upstream` stands for the gradient that comes back to a value. `own_gradients` gives the values, and passes the
gradients to the operands. Both only exist in graphs: whoever runs one calls `with_own_gradients` in their place.
`torch.library` registers the ops.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch.fx import Graph, Node

from mst_fx.core.graph_walk import ancestors, in_order

_library = torch.library.Library("mst_fx", "FRAGMENT")
_library.define("upstream(Tensor value) -> Tensor")
_library.define("own_gradients(Tensor[] values, Tensor[] operands, Tensor[] gradients) -> Tensor[]")


def _upstream(value: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(value)


def _own_gradients(values: list[torch.Tensor], operands: Any, gradients: Any) -> list[torch.Tensor]:
    return [torch.empty_like(value) for value in values]


torch.library.register_fake("mst_fx::upstream", _upstream, lib=_library)
torch.library.register_fake("mst_fx::own_gradients", _own_gradients, lib=_library)
upstream = torch.ops.mst_fx.upstream.default
own_gradients = torch.ops.mst_fx.own_gradients.default

Backward: TypeAlias = Callable[[Sequence[torch.Tensor]], Sequence[torch.Tensor]]


class Own(NamedTuple):
    """The arguments of a node of `own_gradients`."""

    values: Sequence[Node]
    operands: Sequence[Node]
    gradients: Sequence[Node]


def own_of(node: Node) -> Own:
    """Return the arguments of a node of `own_gradients`."""
    arguments: Any = node.args
    return Own(*arguments)


def read_forward(node: Node) -> list[Node]:
    """Return what a node's value is made of, without the gradients that it brings."""
    if node.target != own_gradients:
        return node.all_input_nodes
    own = own_of(node)
    return list(dict.fromkeys((*own.values, *own.operands)))


def only_for_gradients(graph: Graph) -> tuple[Node, ...]:
    """Return the nodes that only the gradients of such functions are made of, in graph order."""
    gradients = [
        gradient for node in graph.nodes if node.target == own_gradients for gradient in own_of(node).gradients
    ]
    if not gradients:
        return ()
    forward = ancestors(graph.output_node().all_input_nodes, read_forward)
    return in_order(graph, ancestors(gradients) - forward)


def backward_of(
    node: Node, steps: Iterable[Node], env: Mapping[Node, Any], run: Callable[[Node, Mapping[Node, Any]], Any]
) -> Backward:
    """Return what gives the gradients that a function brings, from those of its values.

    Args:
        node: of `own_gradients`.
        steps: nodes that only gradients are made of, in graph order; others than those of this function do not run.
        env: the values of the forward; it may grow until the backward runs.
        run: runs one node on the values of its operands.
    """
    own = own_of(node)
    mine = ancestors(own.gradients, read_forward)

    def backward(grads: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        grad_of, local = dict(zip(own.values, grads, strict=True)), dict(env)
        for step in steps:
            if step in mine:
                local[step] = grad_of[step.all_input_nodes[0]] if step.target == upstream else run(step, local)
        return [local[gradient] for gradient in own.gradients]

    return backward


def with_own_gradients(
    values: Sequence[torch.Tensor], operands: Sequence[torch.Tensor], backward: Backward
) -> tuple[torch.Tensor, ...]:
    """Return the values, for autograd as a function of the operands.

    Args:
        values: tensors that need a gradient if one of the operands does.
        operands: the tensors that get a gradient.
        backward: gives the gradients of the operands, from those of the values.
    """
    results: tuple[torch.Tensor, ...] = _WithOwnGradients.apply(backward, len(values), *values, *operands)
    return results


class _WithOwnGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backward: Backward, count: int, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.run_backward, ctx.count = backward, count
        return tuple(value.view_as(value) for value in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *upstream: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return (None, None, *(None for _ in range(ctx.count)), *ctx.run_backward(upstream))
