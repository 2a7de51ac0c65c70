"""Partition an aten graph into stages by its placements.

prologue   whole values that cost something (the cast of a weight): once, before the loop
loop       split values, and the views of whole values that they read
epilogue   what reads a sum over the axis (the division of a mean): once, after the loop
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from itertools import filterfalse
from typing import Any, cast

import torch
from torch.fx import Graph, GraphModule, Node

from mst_fx.core.aten_ops import CONTRACTIONS, DRAWS, FILLS, RESHAPES, SHOWS_MEMORY
from mst_fx.core.graph_walk import ancestors, in_order
from mst_fx.core.refusal import Reason, Refusal
from mst_fx.core.sizes import is_size, is_symbolic
from mst_fx.ops.own_gradients import own_gradients, own_of, read_forward
from mst_fx.placement.axis import choose_axis
from mst_fx.placement.placement import WHOLE, Placement, Routed, Split, adds_up, split_of
from mst_fx.placement.propagate import Placements
from mst_fx.placement.rules import inverted, positions_of, shape_of, tied_to_chunks
from mst_fx.placement.run_on_chunk import numbers_read


@dataclass(frozen=True)
class Stages:
    """A region's aten graph, partitioned into three stages.

    Attributes:
        graph: the whole aten graph.
        placements: of every value before and in the loop.
        stream: the placeholder that carries the tokens.
        axis: the split of the stream.
        length: positions of the axis; symbolic where it is only known at run time.
        prologue, loop, epilogue: nodes in graph order.
        backward: nodes that the backward of the loop runs besides: gradients that functions bring are made of them.
        projections: values of the loop whose gradients leave it, in place of the gradients of the whole values that
            they are made of.
        sums: values that add up over the chunks, and that are made at once, behind the loop, of its results; the
            backward of the loop takes their gradients.
        operands: what the loop reads: placeholders and values of the prologue.
        results: what the loop gives: values that the epilogue reads or that leave the region.
        outputs: what the region gives: results of the loop or values of the epilogue.
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
    backward: tuple[Node, ...] = ()
    projections: tuple[Node, ...] = ()
    sums: tuple[Node, ...] = ()

    @property
    def values(self) -> list[torch.Tensor]:
        """The fake values of the operands."""
        return [node.meta["val"] for node in self.operands]

    @property
    def leaves(self) -> tuple[Node, ...]:
        """What the backward of the loop can give gradients of: the operands, then the projections."""
        return (*self.operands, *self.projections)

    @property
    def ends(self) -> tuple[Node, ...]:
        """What the backward of the loop can take gradients of: the results, then the sums."""
        return (*self.results, *self.sums)

    @property
    def behind(self) -> tuple[Node, ...]:
        """The nodes that make the sums of the results, in graph order."""
        return self._made_of(self.sums, {*self.results, *self.operands, *self.prologue})

    @property
    def projecting(self) -> tuple[Node, ...]:
        """The nodes that make the projections, in graph order."""
        return self._made_of(self.projections, {*self.operands, *self.prologue})

    def _made_of(self, ends: tuple[Node, ...], given: set[Node]) -> tuple[Node, ...]:
        return in_order(self.graph, ancestors(ends, stop=lambda node: _is_placeholder(node) or node in given))

    @property
    def products(self) -> list[Node]:
        """The matrix products of the loop."""
        return [node for node in self.loop if node.target in CONTRACTIONS]

    @property
    def dynamic(self) -> bool:
        """Whether the length is only known at run time."""
        return is_symbolic(self.length)

    def results_behind(self, outputs: Iterable[Node]) -> set[Node]:
        """Return the loop's results, or sums, that these outputs are, or that the epilogue makes them from."""
        behind = ancestors(outputs, lambda node: node.all_input_nodes if node in self.epilogue else ())
        return behind.intersection(self.ends)

    def placement(self, node: Node) -> Placement:
        """Return the placement of a node of the loop whose value is one tensor."""
        return cast(Placement, self.placements.of[node])


class Numbers(Exception):  # noqa: N818 - control flow within the analysis
    """Ops of the loop read numbers that are only known at run time, where they take no tensor.

    Attributes:
        read: pairs of an op and a number that it reads.
    """

    def __init__(self, read: list[tuple[Node, Node]]) -> None:
        super().__init__(f"numbers: {read}")
        self.read = read


def partition(lowered: GraphModule, stream: Node, *, tokens_whole: bool = False) -> Stages:
    """Choose the axis among the dims of `stream` (a placeholder of `lowered`) and partition the graph into stages.

    Each node that an output depends on is in exactly one stage and reads nothing of a later stage: whole values that
    cost something are in the prologue, what reads a sum is in the epilogue, all else is in the loop.

    Args:
        lowered: holds the graph.
        stream: a placeholder.
        tokens_whole: whether the stream is a weight, and the tokens are whole: their number may vary then.

    Raises:
        Refusal: no dim of the stream can be split, or an output does not lie along it.
        Numbers: numbers have to be fixed first.
        Unequal: two sizes have to be made equal first.
    """
    graph, choice = lowered.graph, choose_axis(lowered.graph, stream, tokens_whole=tokens_whole)
    placements = choice.placements
    outputs = _outputs(graph)
    for node in outputs:
        _check_output(node, placements)
    read_later = {*outputs, *_operands(placements.epilogue)}.difference(placements.epilogue)
    results = tuple(node for node in in_order(graph, read_later) if placements.of[node] != WHOLE)
    length = choice.axis.axis_length(shape_of(stream))
    fixed = tokens_whole and not is_symbolic(length)
    loop, backward = _loop(graph, placements, results, fixed=fixed)
    run = (*loop, *backward)
    read = {n for node in run for n in _read_by_chunk(node, placements)}
    read |= {gradient for node in loop if node.target == own_gradients for gradient in own_of(node).gradients}
    operands = in_order(graph, read.difference(run))
    for node in operands:
        _check_operand(node, placements, fixed=fixed)
    return Stages(
        graph=graph,
        placements=placements,
        stream=stream,
        axis=choice.axis,
        length=length,
        prologue=_prologue(graph, placements, operands),
        loop=loop,
        epilogue=placements.epilogue,
        operands=operands,
        results=results,
        outputs=outputs,
        backward=backward,
    )


def _outputs(graph: Graph) -> tuple[Node, ...]:
    """Return the outputs of the graph; one value may be in them twice."""
    returned: Any = graph.output_node().args[0]
    return (returned,) if isinstance(returned, Node) else tuple(returned)


def _check_output(node: Node, placements: Placements) -> None:
    """Raise a refusal for an output that a loop cannot give: a whole value, or rows that each chunk sorts."""
    if node in placements.epilogue:
        return
    placement = placements.of[node]
    if placement == WHOLE:
        raise Refusal(Reason.AXIS_MIXED, node, "a result of the region does not depend on the split axis")
    if isinstance(placement, Routed) and not adds_up(placement):
        raise Refusal(Reason.AXIS_MIXED, node, "sorted rows leave the region before they are brought back")


def _loop(
    graph: Graph, placements: Placements, results: tuple[Node, ...], *, fixed: bool
) -> tuple[tuple[Node, ...], tuple[Node, ...]]:
    """Return the nodes that compute the results, and those that only gradients which functions bring are made of.

    They start from the graph's inputs and the values of the prologue.

    Args:
        graph: the whole aten graph.
        placements: of its values.
        results: the values that the loop gives.
        fixed: whether the axis is, and other sizes may vary: a body knows these.
    """
    tied = tied_to_chunks(list(graph.nodes))

    def ends(node: Node) -> bool:
        shown = node.target in RESHAPES and fixed
        costs = node not in tied and _is_whole(node, placements) and not shown and _costs(node)
        return _is_placeholder(node) or node in placements.made or costs

    reads = partial(_read_by_chunk, placements=placements)
    loop = in_order(graph, ancestors(filterfalse(_is_placeholder, results), reads, stop=ends))
    gradients = [gradient for node in loop if node.target == own_gradients for gradient in own_of(node).gradients]
    behind = ancestors(filterfalse(ends, gradients), reads, stop=ends).difference(loop)
    backward = in_order(graph, behind)
    run = [node for node in (*loop, *backward) if not (fixed and node.target in RESHAPES)]
    numbers = [(node, number) for node in run for number in numbers_read(node, placements.of[node])]
    if numbers:
        raise Numbers(numbers)
    return loop, backward


def _read_by_chunk(node: Node, placements: Placements) -> list[Node]:
    """Return the tensors that a node of the loop reads: the sizes of a split value come from the chunk."""
    permutation = inverted(node, placements.of[node])
    if permutation is not None:
        return [permutation]
    counted = positions_of(node) if split_of(placements.of[node]) is not None else ()
    return [n for n in read_forward(node) if n not in counted and not is_size(n.meta.get("val"))]


def _prologue(graph: Graph, placements: Placements, operands: tuple[Node, ...]) -> tuple[Node, ...]:
    """Return the nodes that make the whole values that the loop and the epilogue read."""
    read = [node for node in (*operands, *_operands(placements.epilogue)) if not _is_placeholder(node)]
    made = (node for node in read if node in placements.made or _is_whole(node, placements))
    return in_order(graph, ancestors(made, stop=_is_placeholder))


def _is_whole(node: Node, placements: Placements) -> bool:
    return node not in placements.epilogue and placements.of[node] == WHOLE


def _check_operand(node: Node, placements: Placements, *, fixed: bool) -> None:
    """Raise a refusal for an operand that is no tensor, or has a size, other than the axis, known only at run time.

    One body serves every chunk. It takes such sizes where `fixed` says that the axis has none.
    """
    value, placement = node.meta.get("val"), placements.of[node]
    if not isinstance(value, torch.Tensor):
        raise Refusal(Reason.DYNAMIC, node, f"the loop reads {node}, which is no tensor")
    sizes = list(value.shape)
    if isinstance(placement, Split):
        sizes[placement.dim : placement.dim + 1] = [placement.outer, placement.inner]
    if not fixed and any(is_symbolic(size) for size in sizes):
        raise Refusal(Reason.DYNAMIC, node, f"{node} of shape {list(value.shape)} has a second size known at run time")


def _costs(node: Node) -> bool:
    """Return whether a whole value would cost something in every chunk.

    It draws a number, computes something from a tensor, or reads a number that is only known at run time.
    """
    costs_nothing = node.target in SHOWS_MEMORY or node.target in FILLS
    if costs_nothing and any(is_size(operand.meta.get("val")) for operand in node.all_input_nodes):
        return not is_size(node.meta.get("val"))
    return node.target in DRAWS or (not costs_nothing and bool(node.all_input_nodes))


def _operands(nodes: Iterable[Node]) -> list[Node]:
    return [operand for node in nodes for operand in node.all_input_nodes]


def _is_placeholder(node: Node) -> bool:
    return node.op == "placeholder"
