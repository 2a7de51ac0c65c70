"""One op, or a few, run in chunks on real values: what the placement rules accept is compared with the whole.

Gradients are compared as well. Graphs are built by hand and run eagerly, so that thousands of calls take seconds.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import torch
from torch.fx import Graph, GraphModule, Node
from torch.utils._pytree import tree_map_only

from mst_fx.capture.run_node import execute
from mst_fx.core.refusal import Refusal
from mst_fx.placement.placement import WHOLE, Split, adds_up, split_of
from mst_fx.placement.propagate import Placements, propagate
from mst_fx.placement.rules import Spans
from mst_fx.placement.run_on_chunk import run_resized

Placed = TypeVar("Placed")

EXACT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-12, "equal_nan": True}
SINGLE: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5, "equal_nan": True}
"""How close values in float64, and in float32, have to be; ops add up in another order in chunks."""


def all_splits(shape: Sequence[int]) -> list[Split]:
    """Return every way to cut a value of this shape along an axis longer than 1."""
    return [
        Split(dim, outer, inner)
        for dim, size in enumerate(shape)
        for outer in divisors(size)
        for inner in divisors(size // outer)
        if outer * inner < size
    ]


def divisors(size: int) -> list[int]:
    """Return the numbers that divide a size."""
    return [number for number in range(1, size + 1) if size % number == 0]


class Program:
    """An aten graph, built call by call; every node carries its real value."""

    def __init__(self) -> None:
        self.module = GraphModule({}, Graph())
        self.graph = self.module.graph
        self.inputs: list[Node] = []
        self.outputs: list[Node] = []

    def input(self, value: torch.Tensor) -> Node:
        """Return a placeholder of this value."""
        node = self.graph.placeholder(f"x{len(self.inputs)}")
        node.meta["val"] = value.detach().requires_grad_(value.requires_grad)
        self.inputs.append(node)
        return node

    def call(self, target: Any, /, *args: Any, **kwargs: Any) -> Node:
        """Return a call of an op, whose value is computed at once."""
        node = self.graph.call_function(target, args, kwargs)
        values = tree_map_only(Node, lambda operand: operand.meta["val"], (args, kwargs))
        node.meta["val"] = target(*values[0], **values[1])
        return node

    def results(self, node: Node) -> list[Node]:
        """Return the tensors that a node gives, each as a node."""
        value = node.meta["val"]
        if isinstance(value, torch.Tensor):
            return [node]
        return [self.call(operator.getitem, node, position) for position in range(len(value))]

    def nodes(self) -> list[Node]:
        """Return the calls."""
        return [node for node in self.graph.nodes if node.op == "call_function"]


def check(program: Program, seeds: Sequence[Node] | None = None) -> Counter[str]:
    """Split any of the inputs (or `seeds`) anyhow, and compare the results and gradients with the whole.

    Returns:
        How many splits the rules "accepted" and "refused".

    Raises:
        AssertionError: the rules accepted a split, and the chunks do not make up the whole.
    """
    found: Counter[str] = Counter()
    truth = _gradients(program, [node.meta["val"] for node in program.outputs])
    for seed in program.inputs if seeds is None else seeds:
        for split in all_splits(seed.meta["val"].shape):
            is_accepted = False
            for axis, placements in accepted(seed, split, partial(_placed, program, seed)):
                is_accepted = True
                for chunk in {1, max(1, axis.axis_length(seed.meta["val"].shape) - 1)}:
                    _compare(program, seed, axis, placements, chunk, truth)
            found["accepted" if is_accepted else "refused"] += 1
    return found


def _placed(program: Program, seed: Node, split: Split) -> Placements:
    return propagate(program.graph, {seed: split})


def accepted(seed: Node, split: Split, place: Callable[[Split], Placed]) -> Iterator[tuple[Split, Placed]]:
    """Yield the split, or the parts of it that a view asks for, and what `place` makes of each; nothing if refused."""
    if split.axis_length(seed.meta["val"].shape) < 2:
        return
    try:
        yield split, place(split)
    except Refusal:
        pass  # any other exception is a failure
    except Spans as spans:
        for outer, inner in spans.factors:
            assert outer * inner > 1, "a part is shorter than the axis"
            yield from accepted(seed, Split(split.dim, split.outer * outer, split.inner * inner), place)


def _compare(
    program: Program, seed: Node, axis: Split, placements: Placements, chunk: int, truth: list[torch.Tensor | None]
) -> None:
    results = _in_chunks(program, placements, axis.axis_length(seed.meta["val"].shape), chunk)
    if results is None:
        return
    message = f"{[node.format_node() for node in program.nodes()]}, {seed} as {axis}, chunks of {chunk}"
    values = [node.meta["val"] for node in program.graph.nodes]
    single = any(isinstance(value, torch.Tensor) and value.dtype == torch.float32 for value in values)
    close = SINGLE if single else EXACT
    for node, result in zip(program.outputs, results, strict=True):
        _same(result, node.meta["val"], close, message)
    if any(gradient is not None for gradient in truth):
        for ours, theirs in zip(_gradients(program, results), truth, strict=True):
            assert ours is not None
            assert theirs is not None
            _same(ours, theirs, close, "gradients of " + message)


def _same(ours: torch.Tensor, theirs: torch.Tensor, close: dict[str, Any], message: str) -> None:
    assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype), f"{ours.shape} {ours.dtype}, {message}"
    if not torch.equal(ours, theirs):
        torch.testing.assert_close(ours, theirs, **close, msg=lambda text: f"{text}\n{message}")


def _in_chunks(program: Program, placements: Placements, length: int, chunk: int) -> list[torch.Tensor] | None:
    """Return the outputs; None where sorted rows leave the program: their order is that of each chunk."""
    late = set(placements.epilogue)
    parts: dict[Node, list[Any]] = {node: [] for node in program.nodes() if node not in late}
    for start in range(0, length, chunk):
        env = _run(program, placements, list(parts), start, min(chunk, length - start))
        for node, values in parts.items():
            values.append(env[node])
    env = {node: node.meta["val"] for node in program.inputs}
    for node, values in parts.items():
        if isinstance(values[0], torch.Tensor):
            env[node] = _put_together(values, placements.of[node])
    if any(node not in late and env[node] is None for node in program.outputs):
        return None
    for node in placements.epilogue:
        env[node] = execute(program.module, node, env)
    return [env[node] for node in program.outputs]


def _run(
    program: Program, placements: Placements, nodes: Sequence[Node], start: int, positions: int
) -> dict[Node, Any]:
    """Return the values of one chunk."""
    env: dict[Node, Any] = {node: _piece(node, placements, start, positions) for node in program.inputs}
    for node in nodes:
        if node in placements.made:
            env[node] = _piece(node, placements, start, positions)
        else:
            env[node] = run_resized(node, placements.of[node], positions, env)
        _check_part(node, placements, positions, env[node])
    return env


def _put_together(parts: Sequence[torch.Tensor], placement: Any) -> torch.Tensor | None:
    if isinstance(placement, Split):
        return _joined(parts, placement)
    if placement == WHOLE:
        return parts[0]
    return sum(parts[1:], start=parts[0]) if adds_up(placement) else None


def _check_part(node: Node, placements: Placements, positions: int, part: Any) -> None:
    """Check that a part has the shape that its placement says; what is whole is the same in each chunk."""
    value, placement = node.meta["val"], placements.of[node]
    if not isinstance(value, torch.Tensor):
        return
    split = split_of(placement)
    expected = split.chunk_shape(value.shape, positions) if split else list(value.shape)
    message = f"{node.format_node()}, placed as {placement}, in {positions} positions"
    assert (list(part.shape), part.dtype) == (expected, value.dtype), f"{list(part.shape)} {part.dtype}, {message}"
    if placement == WHOLE:
        _same(part, value, EXACT, message)


def _piece(node: Node, placements: Placements, start: int, positions: int) -> torch.Tensor:
    value, split = node.meta["val"], placements.of[node]
    if not isinstance(split, Split):
        return value
    apart = _axis_apart(value, split).narrow(split.dim + 1, start, positions)
    return apart.reshape(split.chunk_shape(value.shape, positions)).clone(memory_format=torch.contiguous_format)


def _joined(parts: Sequence[torch.Tensor], split: Split) -> torch.Tensor:
    joined = torch.cat([_axis_apart(part, split) for part in parts], split.dim + 1)
    return joined.flatten(split.dim, split.dim + 2)


def _axis_apart(value: torch.Tensor, split: Split) -> torch.Tensor:
    return value.unflatten(split.dim, (split.outer, -1, split.inner))


def _gradients(program: Program, results: Sequence[torch.Tensor]) -> list[torch.Tensor | None]:
    """Return the gradients of the inputs, with the same cotangents for the same results; None where there are none."""
    leaves = [node.meta["val"] for node in program.inputs if node.meta["val"].requires_grad]
    ends = [x for x in results if x.requires_grad]
    if not leaves or not ends:
        return [None]
    cotangents = [torch.linspace(0.3, 1.7, x.numel(), dtype=x.dtype).reshape(x.shape) for x in ends]
    try:
        return list(torch.autograd.grad(ends, leaves, cotangents, materialize_grads=True, retain_graph=True))
    except (RuntimeError, NotImplementedError):
        return [None]  # the whole has no derivative either: `truth` is asked first
