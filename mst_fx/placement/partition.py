"""Aten graph + placements -> what runs before, in and after the loop.

prologue   whole values that cost something (a weight's cast): once, before
loop       split values, and the views of whole values that they read
epilogue   what reads a sum over the axis (the division of a mean): once, after
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import filterfalse
from typing import cast

import torch
from torch.fx import Graph, GraphModule, Node

from mst_fx.core.aten_ops import CONTRACTIONS, DRAWS, FILLS, VIEWS
from mst_fx.core.graph_walk import ancestors, in_order
from mst_fx.core.refusal import Reason, Refusal
from mst_fx.core.sizes import hint, is_size, is_symbolic
from mst_fx.core.values import bytes_made
from mst_fx.placement.placement import WHOLE, Placement, Routed, Split, adds_up, split_of
from mst_fx.placement.propagate import Placements, Unequal, propagate
from mst_fx.placement.rules import Spans, inverted, positions_of, shape_of
from mst_fx.placement.run_on_chunk import numbers_read


@dataclass(frozen=True)
class Stages:
    """A region's aten graph, cut in three.

    Attributes:
        graph: the whole aten graph.
        placements: of every value before and in the loop.
        stream: the placeholder that carries the tokens.
        axis: the split of the stream.
        length: positions of the axis; symbolic where only known at run time.
        prologue, loop, epilogue: nodes in graph order.
        operands: what the loop reads: placeholders and results of the prologue.
        results: what the loop gives: values that the epilogue reads or that leave the region.
        outputs: what the region gives: loop results or values of the epilogue.
    """

    graph: Graph
    placements: Placements
    stream: Node
    axis: Split
    length: int
    prologue: tuple[Node, ...]
    loop: tuple[Node, ...]
    epilogue: tuple[Node, ...]
    operands: tuple[Node, ...]
    results: tuple[Node, ...]
    outputs: tuple[Node, ...]

    @property
    def products(self) -> list[Node]:
        """The matrix products of the loop."""
        return [node for node in self.loop if node.target in CONTRACTIONS]

    @property
    def dynamic(self) -> bool:
        """Whether the length is only known at run time."""
        return is_symbolic(self.length)

    def results_behind(self, outputs: Iterable[Node]) -> set[Node]:
        """The loop's results that make these outputs, straight or by way of the epilogue."""
        behind = ancestors(outputs, lambda node: node.all_input_nodes if node in self.epilogue else ())
        return behind.intersection(self.results)

    def placement(self, node: Node) -> Placement:
        """Of a tensor-valued node of the loop."""
        return cast(Placement, self.placements.of[node])


class Numbers(Exception):  # noqa: N818 - control flow within the analysis
    """The loop reads numbers that are only known at run time, in ops that take no tensor there.

    Attributes:
        read: (the op, the number) for each.
    """

    def __init__(self, read: list[tuple[Node, Node]]) -> None:
        super().__init__(f"numbers: {read}")
        self.read = read


@dataclass(frozen=True)
class _Choice:
    """An axis that every op respects.

    Attributes:
        axis: the split of the stream.
        placements: that follow.
        length: positions, as hinted.
        saved: bytes of the split values that need not exist at once.
    """

    axis: Split
    placements: Placements
    length: int
    saved: float


def cut(lowered: GraphModule, stream: Node) -> Stages:
    """Choose the axis among the dims of `stream` (a placeholder of `lowered`) and cut the graph.

    The longest axis that every op respects wins, among those that save at least half of what the best one does.

    Raises:
        Refusal: no dim of the stream can be split, with the reason that the longest one met.
        Numbers: numbers have to be fixed first.
        Unequal: sizes have to be made equal first.
    """
    shape = shape_of(stream)
    candidates = [Split(dim) for dim in _splittable(stream, shape)]
    refusals: list[tuple[int, Refusal | Unequal]] = []
    found: list[_Choice] = []
    seen: set[Split] = set()
    while candidates:
        axis = candidates.pop()
        length = axis.axis_length(shape)
        if axis in seen or hint(length) < 2:
            continue
        seen.add(axis)
        try:
            found.append(_chosen(lowered.graph, stream, axis))
        except (Refusal, Unequal) as refusal:
            if not _is_last(axis, shape) or is_symbolic(length):  # features are mixed as a rule
                refusals.append((hint(length), refusal))
        except Spans as spans:
            parts = [part for part in spans.parts if not any(map(is_symbolic, part))]
            candidates += [Split(axis.dim, axis.outer * outer, axis.inner * inner) for outer, inner in parts]
            text = f"{spans.node.target} spreads the split dim over several dims"
            refusals.append((0, Refusal(Reason.AXIS_MIXED, spans.node, text)))
    if found:
        most = max(choice.saved for choice in found)
        good = (choice for choice in found if 2 * choice.saved >= most)
        best = max(good, key=lambda choice: (choice.length, -choice.axis.dim))
        return _cut(lowered.graph, best.placements, stream, best.axis, best.axis.axis_length(shape))
    if refusals:
        raise max(refusals, key=lambda entry: entry[0])[1]
    raise Refusal(Reason.SHAPE, stream, f"a stream of shape {list(shape)} has no dim to split")


def _chosen(graph: Graph, stream: Node, axis: Split) -> _Choice:
    placements = propagate(graph, {stream: axis})
    shape = shape_of(stream)
    if _is_last(axis, shape):
        _forbid_features(graph, placements, axis)
    length = hint(axis.axis_length(shape))
    values = [node for node in placements.of if node.op == "call_function" and node.target not in VIEWS]
    split = sum(bytes_made(node) for node in values if split_of(placements.of[node]) is not None)
    return _Choice(axis, placements, length, split * (1 - 1 / length))


def _is_last(axis: Split, shape: tuple[int, ...]) -> bool:
    return axis.dim == len(shape) - 1 > 0


def _forbid_features(graph: Graph, placements: Placements, axis: Split) -> None:
    """Raise a refusal where the last dim holds features: products of the stream do not keep it apart."""
    products = [node for node in graph.nodes if node.target in CONTRACTIONS]
    streamed = [node for node in products if placements.of.get(node) != WHOLE]
    for node in streamed:
        if not isinstance(placements.of.get(node), Split):
            raise Refusal(Reason.AXIS_MIXED, node, f"{node.target} adds up over dim {axis.dim}")
    if not streamed:
        output = graph.output_node()
        raise Refusal(Reason.AXIS_MIXED, output, f"no product keeps the positions of dim {axis.dim} apart")


def _splittable(stream: Node, shape: tuple[int, ...]) -> list[int]:
    """Every dim; where one length is only known at run time, that dim alone."""
    dynamic = [dim for dim in range(len(shape)) if is_symbolic(shape[dim])]
    if len(dynamic) > 1:
        raise Refusal(Reason.DYNAMIC, stream, f"several dims of {list(shape)} are only known at run time")
    return dynamic or list(range(len(shape)))


def _cut(graph: Graph, placements: Placements, stream: Node, axis: Split, length: int) -> Stages:
    (output,) = (node for node in graph.nodes if node.op == "output")
    returned = output.args[0]
    outputs = (returned,) if isinstance(returned, Node) else tuple(returned)  # one value may stand there twice
    epilogue = set(placements.epilogue)
    left = in_order(graph, {*outputs, *_operands(placements.epilogue)} - epilogue)
    results = tuple(node for node in left if placements.of[node] != WHOLE)
    for node in outputs:
        if node not in epilogue and placements.of[node] == WHOLE:
            raise Refusal(Reason.AXIS_MIXED, node, "a result of the region does not depend on the split axis")
        if node not in epilogue and isinstance(placements.of[node], Routed) and not adds_up(placements.of[node]):
            raise Refusal(Reason.AXIS_MIXED, node, "sorted rows leave the region before they are brought back")

    def whole(node: Node) -> bool:
        return node not in epilogue and placements.of[node] == WHOLE

    made = placements.made
    hoisted = {n for n in graph.nodes if n.op == "call_function" and (n in made or (whole(n) and _costs(n)))}

    def reads(node: Node) -> list[Node]:
        """A split value's sizes come from the chunk, not from nodes that compute the whole's."""
        order = inverted(node, placements.of[node])
        if order is not None:
            return [order]
        counted = positions_of(node) if split_of(placements.of[node]) is not None else ()
        return [n for n in node.all_input_nodes if n not in counted and not is_size(n.meta.get("val"))]

    computed = filterfalse(_is_placeholder, results)
    loop = in_order(graph, ancestors(computed, reads, stop=lambda n: _is_placeholder(n) or n in hoisted))
    numbers = [(node, number) for node in loop for number in numbers_read(node, placements.of[node])]
    if numbers:
        raise Numbers(numbers)
    operands = in_order(graph, {n for node in loop for n in reads(node)}.difference(loop))
    early = (n for n in (*operands, *_operands(placements.epilogue)) if n not in epilogue)
    outside = (n for n in early if not _is_placeholder(n) and (n in made or whole(n)))
    prologue = in_order(graph, ancestors(outside, stop=_is_placeholder))
    for node in operands:
        _check_operand(node, placements)
    return Stages(
        graph=graph,
        placements=placements,
        stream=stream,
        axis=axis,
        length=length,
        prologue=prologue,
        loop=loop,
        epilogue=placements.epilogue,
        operands=operands,
        results=results,
        outputs=outputs,
    )


def _check_operand(node: Node, placements: Placements) -> None:
    """One body serves every chunk: no size but the split axis may be left for run time."""
    value, placement = node.meta.get("val"), placements.of[node]
    if not isinstance(value, torch.Tensor):
        raise Refusal(Reason.DYNAMIC, node, f"the loop reads {node}, which is no tensor")
    sizes = list(value.shape)
    if isinstance(placement, Split):
        sizes[placement.dim : placement.dim + 1] = [placement.outer, placement.inner]
    if any(is_symbolic(size) for size in sizes):
        raise Refusal(Reason.DYNAMIC, node, f"{node} of shape {list(value.shape)} has a second size known at run time")


def _costs(node: Node) -> bool:
    """Whether a whole node cannot be made for free inside the loop.

    It draws a number, computes something from a tensor, or reads a number that is only known at run time.
    """
    free = node.target in VIEWS or node.target in FILLS
    if free and any(is_size(operand.meta.get("val")) for operand in node.all_input_nodes):
        return not is_size(node.meta.get("val"))
    return node.target in DRAWS or (not free and bool(node.all_input_nodes))


def _operands(nodes: Iterable[Node]) -> list[Node]:
    return [operand for node in nodes for operand in node.all_input_nodes]


def _is_placeholder(node: Node) -> bool:
    return node.op == "placeholder"
