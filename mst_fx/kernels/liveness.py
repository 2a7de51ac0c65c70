"""Peak of a body: which of its values become buffers, when they are made, and when they die.

A model of what a fusing compiler makes of an aten graph, no record of what it did:
  - a matrix product, and whatever else no kernel is generated for, reads and writes buffers
  - all other ops between two such steps are fused; of them become buffers what such a step reads, what the body
    returns, and what is reduced; everything else is computed again where it is read
  - what is made from the same buffers is one kernel, whose buffers are alive together
  - a buffer that one value of the kernel alone is made from, and nobody reads later, is overwritten by it if the sizes
    agree; reductions are read first where they are loops of their own, as in C++, and at the same time in Triton
  - the values of a kernel of ours are written one behind the other (see `write_order`): there the last one that is made
    from a buffer overwrites it
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch.fx import GraphModule, Node

from mst_fx.core.aten_ops import NONE, PICK_ENTRIES, REDUCE_THEN_MAP, SHOWS_MEMORY, SOFTMAXES, UNFUSED, VIEWS
from mst_fx.core.graph_walk import ancestors, in_order

aten = torch.ops.aten

Size = Callable[[Node], float]
Buffer = TypeVar("Buffer", bound=Hashable)


@dataclass(frozen=True)
class Step(Generic[Buffer]):
    """One kernel, or one call of a library.

    Attributes:
        reads, makes: buffers.
        overwrites: pairs of a buffer that is read and one that is made, which may lie in its memory.
        chain: of what it makes, what is written one behind the other.
    """

    reads: frozenset[Buffer]
    makes: tuple[Buffer, ...]
    overwrites: tuple[tuple[Buffer, Buffer], ...] = ()
    chain: tuple[Buffer, ...] = ()


def peak(
    module: GraphModule,
    size: Size,
    *,
    reductions_apart: bool,
    ordered: bool,
    multiplied: Collection[tuple[Node, Node]] = (),
) -> float:
    """The most that `size` of the buffers alive adds up to, those of the inputs (alive throughout) left out.

    Args:
        module: an aten graph; views hold no memory.
        size: of the buffer of one value.
        reductions_apart: whether a kernel's reductions are over before it writes, as in C++.
        ordered: whether a kernel's values are written in an order that lets them overwrite.
        multiplied: pairs of results that are not kept: a product reads them as soon as both are there.
    """
    pairs = [(buffer_of(left), buffer_of(right)) for left, right in multiplied]
    steps = _Steps(module, reductions_apart, ordered, early=frozenset(node for pair in pairs for node in pair))
    return most_alive(steps.order, last_reads(steps.order, steps.returned, pairs), size)


def last_reads(
    steps: Sequence[Step[Buffer]], returned: Collection[Buffer], multiplied: Collection[tuple[Buffer, Buffer]] = ()
) -> dict[Buffer, int]:
    """The step that reads each buffer last, by its number; behind all of them for what is returned.

    Args:
        steps: in the order in which they run.
        returned: buffers that are kept.
        multiplied: pairs of returned buffers that are not kept: the step that makes the later one reads both.
    """
    last = {buffer: number for number, step in enumerate(steps) for buffer in step.reads}
    made = {buffer: number for number, step in enumerate(steps) for buffer in step.makes}
    last.update(dict.fromkeys(set(returned).difference(*multiplied), len(steps)))
    for pair in multiplied:
        both = max(made.get(buffer, -1) for buffer in pair)
        last.update({buffer: max(last.get(buffer, -1), both) for buffer in pair})
    return last


def most_alive(steps: Sequence[Step[Buffer]], last: Mapping[Buffer, int], size: Callable[[Buffer], float]) -> float:
    """The most that the buffers made by the steps take at once.

    While a step runs, alive is what it makes, and what an earlier step has made and this or a later one reads; less
    what it reads last and overwrites, if the sizes agree.

    Args:
        steps: in the order in which they run.
        last: the step that reads each buffer last, by its number; a buffer that nobody reads is not there.
        size: of a buffer.
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
    """For each kernel with several values, those that are best written one behind the other, in this order."""
    for step in _Steps(module, reductions_apart=True, ordered=True).order:
        if len(step.chain) > 1 and all(isinstance(node.meta["val"], torch.Tensor) for node in step.chain):
            yield step.chain


class _Steps:
    """The steps of a graph in the order in which they run: products, and last what is returned.

    What is wanted early is made in its turn, by a kernel of its own.
    """

    def __init__(
        self, module: GraphModule, reductions_apart: bool, ordered: bool, early: frozenset[Node] = frozenset()
    ) -> None:
        self.order: list[Step[Node]] = []
        self._ordered, self._early = ordered, early
        self.returned = {buffer_of(node) for node in module.graph.output_node().all_input_nodes}
        self._apart = reductions_apart
        self._nodes = _alive_nodes(module)
        self._level: dict[Node, int] = {}
        self._reads: dict[Node, frozenset[Node]] = {}
        self._normed: set[Node] = set()
        for node in self._nodes:
            self._place(node)
        self._kernels = self._fused()
        self._done: set[Node] = set()
        for node in self._nodes:
            if node.target in UNFUSED or node in early:
                self._run(node)
        for node in sorted(self.returned):
            self._run(node)

    def _place(self, node: Node) -> None:
        """How many unfused steps lie behind a node, and the buffers that it is computed from."""
        operands = [operand for operand in map(buffer_of, _read_by(node)) if _is_tensor(operand)]
        level = max((self._level.get(operand, 0) for operand in operands), default=0)
        self._level[node] = level + (node.target in UNFUSED)
        behind = [frozenset([o]) if self._is_buffer(o) else self._reads.get(o, frozenset()) for o in operands]
        self._reads[node] = frozenset().union(*behind)
        if any(o.target in SOFTMAXES or (o in self._normed and not self._is_buffer(o)) for o in operands):
            self._normed.add(node)

    def _is_buffer(self, node: Node) -> bool:
        if node.op == "placeholder" or node.target in UNFUSED or node in self.returned or _reduces(node):
            return True
        return any(user.target in UNFUSED for user in _readers(node))

    def _fused(self) -> dict[Node, Step[Node]]:
        """The kernels that make the buffers among fused ops: one for those of a level that read the same."""
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
        if not self._early.isdisjoint((group[0], node)) or self._level[group[0]] != self._level[node]:
            return False
        return any(not self._reads[node].isdisjoint(self._reads[other] | {other}) for other in group)

    def _kernel(self, group: list[Node]) -> Step[Node]:
        reads = frozenset().union(*(self._reads[node] for node in group)) - set(group)
        ahead = {node for node in group if node.target in PICK_ENTRIES and node not in self._normed}
        writers = [node for node in group if node not in ahead and not (self._apart and _reduces(node))]
        buffers = sorted(node for node in reads if node.op != "placeholder")
        chain = self._chain(writers) if self._ordered else ()
        unordered, ordered = (self._overwritten(buffers, writers, order) for order in ((), chain))
        if len(ordered) > len(unordered):
            return Step(reads, tuple(group), ordered, chain)
        return Step(reads, tuple(group), unordered)

    def _overwritten(
        self, buffers: Sequence[Node], writers: Collection[Node], chain: Sequence[Node]
    ) -> tuple[tuple[Node, Node], ...]:
        """Which buffers are overwritten by which values, where those of the chain are written one behind the other."""
        found: dict[Node, Node] = {}
        for old in buffers:
            readers = [new for new in writers if old in self._reads[new]]
            last = [new for new in chain if new in readers][-1:] if set(readers) <= set(chain) else readers
            fits = len(last) == 1 and _numel(last[0]) == _numel(old)
            if fits and (self._apart or last[0].target not in REDUCE_THEN_MAP):
                found.setdefault(last[0], old)
        return tuple((old, new) for new, old in found.items())

    def _chain(self, writers: Collection[Node]) -> tuple[Node, ...]:
        """The values as large as the largest, the ones that read most in front; none if one is read too early."""
        made = [node for node in writers if not _reduces(node) and self._reads[node].isdisjoint(writers)]
        largest = max(made, key=_numel, default=None)
        alike = [node for node in made if largest is not None and _likeness(node) == _likeness(largest)]
        early = [user for node in alike for user in node.users if user < max(alike)]
        if any(user.target in UNFUSED or user.target in VIEWS for user in early):
            return ()
        return tuple(sorted(alike, key=lambda node: -len(self._reads[node])))

    def _run(self, node: Node) -> None:
        """Put the step that makes a buffer behind those that make what it reads."""
        if node in self._done or node.op != "call_function":
            return
        step = self._kernels.get(node) or Step(self._reads[node], (node,))
        self._done.update(step.makes)
        for operand in sorted(step.reads):
            self._run(operand)
        self.order.append(step)


def _alive_nodes(module: GraphModule) -> list[Node]:
    """The calls that results are made of, in order."""
    alive = ancestors(module.graph.output_node().all_input_nodes, _read_by)
    return [node for node in in_order(module.graph, alive) if node.op == "call_function" and _is_tensor(node)]


def _read_by(node: Node) -> list[Node]:
    """The operands that a node reads: a loss of each row has no use for the total weight."""
    operands = node.all_input_nodes
    if node.target == aten.nll_loss_backward.default and node.args[4] == NONE:
        return [operand for operand in operands if operand is not node.args[6]]
    return operands


def _reduces(node: Node) -> bool:
    return node.target not in VIEWS and _numel(node) < max(map(_numel, node.all_input_nodes), default=0)


def _likeness(node: Node) -> tuple[torch.Size, torch.dtype]:
    """Shape and dtype of the value, of its largest part where it is a tuple."""
    value = max(_parts(node), key=torch.Tensor.numel)
    return value.shape, value.dtype


def _numel(node: Node) -> int:
    """Elements of the value, of its largest part where it is a tuple."""
    return max((part.numel() for part in _parts(node)), default=0)


def _parts(node: Node) -> list[torch.Tensor]:
    value = node.meta.get("val")
    return [part for part in (value if isinstance(value, Sequence) else [value]) if isinstance(part, torch.Tensor)]


def buffer_of(node: Node) -> Node:
    """The value whose memory a view shows."""
    while node.target in SHOWS_MEMORY:
        node = node.all_input_nodes[0]
    return node


def _readers(node: Node) -> Iterable[Node]:
    """Who reads the value, through views or not."""
    for user in node.users:
        if buffer_of(user) is node and user is not node:
            yield from _readers(user)
        else:
            yield user


def _is_tensor(node: Node) -> bool:
    return bool(_parts(node))
