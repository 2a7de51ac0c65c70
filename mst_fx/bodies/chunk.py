"""One run of a loop's nodes on one chunk: what bodies are traced from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.fx import Node, map_arg

from mst_fx.bodies.attention import kept_results, run_on_kept
from mst_fx.bodies.derivatives import reads_log_softmax, run_on_logits
from mst_fx.bodies.log_softmax import reduces_wide_rows, run_in_tiles
from mst_fx.core.sizes import at_sizes, expression, is_symbolic, known_sizes, sure
from mst_fx.ops.overwritten import overwritten
from mst_fx.ops.own_gradients import backward_of, own_gradients, own_of, with_own_gradients
from mst_fx.placement.partition import Stages
from mst_fx.placement.placement import Split, split_of
from mst_fx.placement.run_on_chunk import run_resized
from mst_fx.runtime.loop_operator import axis_length
from mst_fx.runtime.result_kinds import Axis
from mst_fx.runtime.results import example


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


def chunk_inputs(stages: Stages, nodes: Sequence[Node], length: int) -> list[torch.Tensor]:
    """Return examples of what the loop hands to a body for operands, results, and gradients of results."""
    layouts = {stages.operands[position]: strides for position, strides in strides_of(stages)}
    return [example(node.meta["val"], axis_of(stages, node), length, layouts.get(node)) for node in nodes]


def merged(stages: Stages, nodes: Sequence[Node], chunks: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Return chunks in the shapes of the graph; a body takes them with the axis as a dim of its own."""
    shaped = list(chunks)
    varying = _varying(stages, nodes, chunks)
    for position, (node, chunk) in enumerate(zip(nodes, chunks, strict=True)):
        split = stages.placement(node)
        if isinstance(split, Split) and (split.outer, split.inner) != (1, 1):
            length = chunk.shape[split.dim + (split.outer != 1)]
            shaped[position] = chunk.view(_chunk_shape(stages, node, length, varying))
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


def computed(
    stages: Stages,
    operands: Sequence[torch.Tensor],
    known: Mapping[Node, torch.Tensor] | None = None,
    wanted: Sequence[int] = (),
) -> dict[Node, Any]:
    """Run the loop's nodes on one chunk; return the values of operands and nodes.

    Args:
        stages: the stages of the region.
        operands: of one chunk.
        known: results of the chunk that need not be computed.
        wanted: positions of the leaves that a gradient is to be taken of.
    """
    run = _Run(stages, operands, known or {}, {stages.leaves[position] for position in wanted})
    for node in stages.loop:
        run.add(node)
    return run.env


class _Run:
    """A run of nodes on one chunk.

    Attributes:
        env: the values so far.
    """

    def __init__(
        self, stages: Stages, operands: Sequence[torch.Tensor], known: Mapping[Node, torch.Tensor], leaves: set[Node]
    ) -> None:
        self.env: dict[Node, Any] = dict(zip(stages.operands, operands, strict=True))
        self._stages, self._known, self._leaves = stages, known, leaves
        self._length = axis_length([axis_of(stages, node) for node in stages.operands], operands)
        self._varying = _varying(stages, stages.operands, operands)
        self._kept = kept_results(stages) if known else {}
        self._inside = set(stages.loop)
        for node in leaves.intersection(self.env):
            self.env[node].requires_grad_()

    def add(self, node: Node) -> None:
        """Run a node, and hand its value on: as it is, known, or as a leaf of its own."""
        value = self._value(node)
        if node in self._known:
            value = _Known.apply(value, self._known[node])
        if node in self._stages.projections:
            value = value.detach().requires_grad_(node in self._leaves)
        _check_shape(self._stages, node, value, self._length)
        self.env[node] = value

    def _value(self, node: Node) -> Any:
        env = self.env
        if node.target == overwritten:
            return _Known.apply(*map_arg(node.args, env.get))
        if node.target == own_gradients:
            values, inputs = (list(map(env.__getitem__, nodes)) for nodes in own_of(node)[:2])
            return with_own_gradients(values, inputs, backward_of(node, self._stages.backward, env, self._resized))
        if node in self._kept:
            return run_on_kept(node, self._kept[node], env, self._known, self._chunk_shape)
        if reads_log_softmax(node, self._inside):
            return run_on_logits(node, env)
        return run_in_tiles(node, env) if reduces_wide_rows(node) else self._resized(node, env)

    def _resized(self, node: Node, env: Mapping[Node, Any]) -> Any:
        value = run_resized(node, self._stages.placements.of[node], self._length, env, self._varying)
        _check_shape(self._stages, node, value, self._length)
        return value

    def _chunk_shape(self, node: Node) -> list[int]:
        return _chunk_shape(self._stages, node, self._length, self._varying)


def _check_shape(stages: Stages, node: Node, value: Any, length: int) -> None:
    """Raise an error unless a value has the shape that its placement says."""
    if split_of(stages.placements.of[node]) is not None:
        expected = _chunk_shape(stages, node, length)
        pairs = zip(value.shape, expected, strict=True)
        if not all(expression(a) == expression(b) or sure(a == b) for a, b in pairs):
            raise AssertionError(f"{node.target} gave {list(value.shape)}, its placement says {expected}")


def _chunk_shape(stages: Stages, node: Node, length: int, varying: Mapping[Any, Any] | None = None) -> list[int]:
    split = split_of(stages.placements.of[node])
    assert split is not None
    return [at_sizes(size, varying or {}) for size in split.chunk_shape(node.meta["val"].shape, length)]


def _varying(stages: Stages, nodes: Sequence[Node], chunks: Sequence[torch.Tensor]) -> dict[Any, Any]:
    """Return the values of the symbols in sizes of whole values, as the trace of a body knows them."""
    whole = [(node, chunk) for node, chunk in zip(nodes, chunks, strict=True) if axis_of(stages, node) is None]
    captured = [size for node, _ in whole for size in node.meta["val"].shape]
    return known_sizes(captured, [size for _, chunk in whole for size in chunk.shape])
