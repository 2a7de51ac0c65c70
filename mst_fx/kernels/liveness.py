"""Peak of a body: which of its values become buffers, when they are made, and when they die.

This models what a fusing compiler makes of an aten graph; it does not record what a compiler did:
  - a matrix product, and any other op without a generated kernel, reads and writes buffers
  - all other ops between two such steps are fused; a value of theirs becomes a buffer if such a step reads it, the body
    returns it, or it is a reduction; every other value is computed again where it is read
  - values that are made from the same buffers share one kernel, and their buffers are alive together
  - a value overwrites a buffer that no other value of its kernel is made from and no later step reads, if the sizes
    agree; a kernel ends its reductions first where they are loops of their own, as in C++; in Triton it does not
  - a kernel with several loops, as in C++, computes costly functions once: it writes a value of theirs that several
    loops read
  - a kernel of ours writes its values one after the other (see `write_order`): the last value that is made from a
    buffer overwrites it
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch.fx import Graph, GraphModule, Node

from mst_fx.core.aten_ops import (
    COSTLY,
    NONE,
    NORMALISE,
    PICK_ENTRIES,
    REDUCE_THEN_MAP,
    SHOWS_MEMORY,
    SOFTMAXES,
    UNFUSED,
    VIEWS,
)
from mst_fx.core.graph_walk import ancestors, in_order, walk
from mst_fx.core.sizes import hint

aten = torch.ops.aten

Size = Callable[[Node], float]
Buffer = TypeVar("Buffer", bound=Hashable)


@dataclass(frozen=True)
class Step(Generic[Buffer]):
    """One kernel, or one call of a library.

    Attributes:
        reads, makes: buffers.
        overwrites: pairs of a buffer that the step reads and one that it makes, which may take its memory.
        chain: the buffers that it writes one after the other.
    """

    reads: frozenset[Buffer]
    makes: tuple[Buffer, ...]
    overwrites: tuple[tuple[Buffer, Buffer], ...] = ()
    chain: tuple[Buffer, ...] = ()


def peak(
    graph: Graph,
    size: Size,
    *,
    reductions_apart: bool,
    ordered: bool,
    costly_once: bool = False,
    kept: Collection[Node] = (),
    multiplied: Collection[tuple[Node, Node]] = (),
) -> float:
    """Return the largest total `size` of the buffers alive at once, without the inputs (alive throughout).

    Args:
        graph: an aten graph; views hold no memory.
        size: the size of a value's buffer, in any unit.
        reductions_apart: whether a kernel ends its reductions before it writes, as in C++.
        ordered: whether a kernel writes its values in an order that lets them overwrite.
        costly_once: whether a value of a costly function is written if several loops of a kernel read it, as in C++.
        kept: values that live to the end, as results do.
        multiplied: pairs of results that do not live to the end: a product reads them, right behind the first product
            that reads one of them, as the gradient of a weight follows that of the tokens.
    """
    pairs = [(buffer_of(left), buffer_of(right)) for left, right in multiplied]
    in_turn = frozenset(node for pair in pairs for node in pair)
    schedule = _Schedule(graph, reductions_apart, ordered, in_turn, costly_once)
    end = schedule.returned.union(map(buffer_of, kept))
    return most_alive(schedule.steps, last_reads(schedule.steps, end, pairs), size)


def last_reads(
    steps: Sequence[Step[Buffer]], returned: Collection[Buffer], multiplied: Collection[tuple[Buffer, Buffer]] = ()
) -> dict[Buffer, int]:
    """Return the number of the step that reads each buffer last; for a returned buffer, the number of steps.

    Args:
        steps: in the order in which they run.
        returned: buffers that live to the end.
        multiplied: pairs of returned buffers that do not: once both are made, the next step that reads one of them
            reads both; without such a step, the one that makes the later buffer does.
    """
    last = {buffer: number for number, step in enumerate(steps) for buffer in step.reads}
    made = {buffer: number for number, step in enumerate(steps) for buffer in step.makes}
    last.update(dict.fromkeys(set(returned).difference(*multiplied), len(steps)))
    for pair in multiplied:
        both = max(made.get(buffer, -1) for buffer in pair)
        behind = enumerate(steps[both + 1 :], both + 1)
        read = next((number for number, step in behind if not step.reads.isdisjoint(pair)), both)
        last.update({buffer: max(last.get(buffer, -1), read) for buffer in pair})
    return last


def most_alive(steps: Sequence[Step[Buffer]], last: Mapping[Buffer, int], size: Callable[[Buffer], float]) -> float:
    """Return the largest total size of the buffers that the steps make and hold at once.

    While a step runs, these are alive: the buffers that it makes, and those that an earlier step made and this or a
    later step reads, without those that it reads last and overwrites, if the sizes agree.

    Args:
        steps: in the order in which they run.
        last: the number of the step that reads each buffer last; it has no entry for a buffer that nobody reads.
        size: the size of a buffer, in any unit.
    """
    alive: set[Buffer] = set()
    most = 0.0
    for number, step in enumerate(steps):
        alive.update(step.makes)
        overwritten = {old for old, new in step.overwrites if last[old] == number and size(old) == size(new)}
        most = max(most, sum(map(size, alive - overwritten)))
        alive = {buffer for buffer in alive if last.get(buffer, -1) > number}
    return most


def chains(module: GraphModule) -> Iterator[tuple[Node, ...]]:
    """Yield, for each kernel with several values, those to write one after the other, in this order."""
    for step in _Schedule(module.graph, reductions_apart=True, ordered=True).steps:
        if len(step.chain) > 1 and all(isinstance(node.meta["val"], torch.Tensor) for node in step.chain):
            yield step.chain


class _Schedule:
    """The steps of a graph in the order in which they run: products in graph order, and last the returned values.

    Each step runs after those that it needs. A value of `in_turn` is made in graph order, too, by a kernel of its own.
    """

    def __init__(
        self,
        graph: Graph,
        reductions_apart: bool,
        ordered: bool,
        in_turn: frozenset[Node] = frozenset(),
        costly_once: bool = False,
    ) -> None:
        self.steps: list[Step[Node]] = []
        self._ordered, self._in_turn = ordered, in_turn
        self.returned = {buffer_of(node) for node in graph.output_node().all_input_nodes}
        self._apart, self._costly_once = reductions_apart, costly_once
        self._nodes = _alive_nodes(graph)
        self._level: dict[Node, int] = {}
        self._reads: dict[Node, frozenset[Node]] = {}
        self._normed: set[Node] = set()
        self._costly: set[Node] = set()
        for node in self._nodes:
            self._place(node)
        self._kernels = self._fused()
        self._done: set[Node] = set()
        for node in self._nodes:
            if node.target in UNFUSED or node in in_turn:
                self._run(node)
        for node in sorted(self.returned):
            self._run(node)

    def _place(self, node: Node) -> None:
        """Find the unfused steps before a node (its level), and the buffers that it is computed from."""
        operands = [operand for operand in map(buffer_of, _read_by(node)) if _is_tensor(operand)]
        level = max((self._level.get(operand, 0) for operand in operands), default=0)
        self._level[node] = level + (node.target in UNFUSED)
        before = [frozenset([o]) if self._is_buffer(o) else self._reads.get(o, frozenset()) for o in operands]
        self._reads[node] = frozenset().union(*before)
        if any(o.target in SOFTMAXES or (o in self._normed and not self._is_buffer(o)) for o in operands):
            self._normed.add(node)
        if node.target in COSTLY or any(o in self._costly and not self._is_buffer(o) for o in operands):
            self._costly.add(node)

    def _is_buffer(self, node: Node) -> bool:
        if node.op == "placeholder" or node.target in UNFUSED or node in self.returned or _reduces(node):
            return True
        written = self._costly_once and node in self._costly and _loops_read(node)
        return written or any(user.target in UNFUSED for user in _readers(node))

    def _fused(self) -> dict[Node, Step[Node]]:
        """Return the kernel of each fused value that is a buffer: one for the values of a level that read the same."""
        groups: list[list[Node]] = []
        for node in self._nodes:
            if node.target in UNFUSED or node.target in VIEWS or not self._is_buffer(node):
                continue
            near = next((group for group in groups if self._meet(group, node)), None)
            if near is None:
                groups.append([node])
            else:
                near.append(node)
        return {node: kernel for group in groups for kernel in [self._kernel(group)] for node in group}

    def _meet(self, group: list[Node], node: Node) -> bool:
        if not self._in_turn.isdisjoint((group[0], node)) or self._level[group[0]] != self._level[node]:
            return False
        return any(not self._reads[node].isdisjoint(self._reads[other] | {other}) for other in group)

    def _kernel(self, group: list[Node]) -> Step[Node]:
        reads = frozenset().union(*(self._reads[node] for node in group)) - set(group)
        ahead = {node for node in group if node.target in PICK_ENTRIES and node not in self._normed}
        writers = [node for node in group if node not in ahead and not (self._apart and _reduces(node))]
        buffers = sorted(node for node in reads if node.op != "placeholder")
        chain = self._chain(writers) if self._ordered else ()
        unordered, ordered = (self._overwritten(buffers, writers, written) for written in ((), chain))
        if len(ordered) > len(unordered):
            return Step(reads, tuple(group), ordered, chain)
        return Step(reads, tuple(group), unordered)

    def _overwritten(
        self, buffers: Sequence[Node], writers: Collection[Node], chain: Sequence[Node]
    ) -> tuple[tuple[Node, Node], ...]:
        """Pair the buffers that are overwritten with the values that do so; the chain's values are written in turn."""
        found: dict[Node, Node] = {}
        for old in buffers:
            readers = [new for new in writers if old in self._reads[new]]
            last = [new for new in chain if new in readers][-1:] if set(readers) <= set(chain) else readers
            fits = len(last) == 1 and _numel(last[0]) == _numel(old)
            if fits and (self._apart or last[0].target not in REDUCE_THEN_MAP):
                found.setdefault(last[0], old)
        return tuple((old, new) for new, old in found.items())

    def _chain(self, writers: Collection[Node]) -> tuple[Node, ...]:
        """Return the values as large as the largest, the widest readers first; none if a step reads one too soon."""
        made = [node for node in writers if not _reduces(node) and self._reads[node].isdisjoint(writers)]
        largest = max(made, key=_numel, default=None)
        alike = [node for node in made if largest is not None and _likeness(node) == _likeness(largest)]
        between = [user for node in alike for user in node.users if user < max(alike)]
        if any(user.target in UNFUSED or user.target in VIEWS for user in between):
            return ()
        return tuple(sorted(alike, key=lambda node: -len(self._reads[node])))

    def _run(self, node: Node) -> None:
        """Add the step that makes a buffer, after the steps that make what it reads."""
        if node in self._done or node.op != "call_function":
            return
        step = self._kernels.get(node) or Step(self._reads[node], (node,))
        self._done.update(step.makes)
        for operand in sorted(step.reads):
            self._run(operand)
        self.steps.append(step)


def _alive_nodes(graph: Graph) -> list[Node]:
    """Return the calls that the results are made of, in graph order."""
    alive = ancestors(graph.output_node().all_input_nodes, _read_by)
    return [node for node in in_order(graph, alive) if node.op == "call_function" and _is_tensor(node)]


def _read_by(node: Node) -> list[Node]:
    """Return the operands that a node reads: the backward of a loss without reduction ignores the total weight."""
    operands = node.all_input_nodes
    if node.target == aten.nll_loss_backward.default and node.args[4] == NONE:
        return [operand for operand in operands if operand is not node.args[6]]
    return operands


def _reduces(node: Node) -> bool:
    return node.target not in VIEWS and _numel(node) < max(map(_numel, node.all_input_nodes), default=0)


def _loops_read(node: Node) -> bool:
    """Return whether several loops of a kernel read a value: one reduces what is made of it, another one maps it."""
    readers = [*_readers(node)]
    if len(readers) == 1 and readers[0].target not in NORMALISE:
        return False
    fused = walk(readers, lambda user: () if user.target in UNFUSED or _reduces(user) else user.users)
    mapped = (user for user in fused if user.op == "call_function" and user.target not in UNFUSED)
    return any(user.target in NORMALISE or _reduces(user) for user in mapped)


def _likeness(node: Node) -> tuple[torch.Size, torch.dtype]:
    """Return shape and dtype of the value, or of the largest tensor of a tuple."""
    value = max(_tensors(node), key=torch.Tensor.numel)
    return value.shape, value.dtype


def _numel(node: Node) -> int:
    """Return the number of elements of the value, or of the largest tensor of a tuple."""
    return max((hint(x.numel()) for x in _tensors(node)), default=0)


def _tensors(node: Node) -> list[torch.Tensor]:
    value = node.meta.get("val")
    return [x for x in (value if isinstance(value, Sequence) else [value]) if isinstance(x, torch.Tensor)]


def buffer_of(node: Node) -> Node:
    """Return the value whose memory a view shows; a value that is no view is its own."""
    while node.target in SHOWS_MEMORY:
        node = node.all_input_nodes[0]
    return node


def _readers(node: Node) -> Iterable[Node]:
    """Yield the nodes that read the value, directly or through views."""
    for user in node.users:
        if buffer_of(user) is node and user is not node:
            yield from _readers(user)
        else:
            yield user


def _is_tensor(node: Node) -> bool:
    return bool(_tensors(node))
