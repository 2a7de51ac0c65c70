"""Single nodes of a captured graph -> the aten ops that each decomposes into, by itself.

A trace costs milliseconds, one more op in it a fraction of one. So one trace takes all nodes, each on the values that
were captured, and none on what another node of the trace gives. A size that is only known at run time makes an op take
several times as long, so the nodes are traced on numbers in place of sizes, but for those whose sizes are asked for.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.utils._pytree import tree_leaves, tree_map

from mst_fx.capture.decompositions import decompositions
from mst_fx.capture.lower import lower, mutates, traced, tracing
from mst_fx.capture.run_node import brings_gradients, execute, execute_with_own_gradients
from mst_fx.core.aten_ops import CONTRACTIONS, ONE_PRODUCT, is_mutable
from mst_fx.core.graph_modules import held_by, operands_read
from mst_fx.core.graph_walk import ancestors, in_order
from mst_fx.core.modes import TOP, Mode
from mst_fx.core.sizes import depends_on_data, hint, is_symbolic
from mst_fx.core.torch_private.captured import FakeTensor
from mst_fx.core.torch_private.tracing import TorchDispatchMode
from mst_fx.core.values import fake_value
from mst_fx.ops.own_gradients import read_forward
from mst_fx.ops.shards import OnDTensors

log = logging.getLogger("mst_fx")


@dataclass(frozen=True)
class Decomposed:
    """The aten graph of one node.

    Attributes:
        position_of: for each placeholder, the position of its operand among the node's `all_input_nodes`.
        ops: the nodes of the graph except placeholders, in graph order.
        backward: the nodes that only gradients which the node brings are made of, in graph order.
        written: positions of the operands that the node wrote to in the trace.
        understood: False where the trace tells nothing but `written`.
    """

    position_of: dict[Node, int]
    ops: tuple[Node, ...]
    backward: tuple[Node, ...] = ()
    written: frozenset[int] = frozenset()
    understood: bool = True


def decompose_alone(owner: GraphModule, node: Node, result: Node, mode: Mode = TOP) -> Decomposed | None:
    """Decompose one node; None where it cannot be traced.

    Args:
        owner: the module that holds the node's graph.
        node: the node; it may write to an operand.
        result: the node itself, or the operand that it writes to if it has no value of its own.
        mode: that the node runs in.
    """
    try:
        nodes, operands = [*held_by([node]), node], operands_read(node)
        lowered = lower(owner, nodes, operands, [result], dict.fromkeys(nodes, mode), gathers=False)
    except Exception as error:  # the user's op may do anything
        log.debug("mst_fx: %s is not understood: %s", node, error)
        return None
    places = enumerate(node.all_input_nodes)
    positions = [place for place, operand in places if operand in operands for _ in tree_leaves(fake_value(operand))]
    position_of = dict(zip(_placeholders(lowered.graph), positions, strict=True))
    return _ops_of(lowered.graph, position_of, lowered.graph.output_node().all_input_nodes)


def decompose_together(owner: GraphModule, nodes: Sequence[Node]) -> dict[Node, Decomposed | None]:
    """Decompose several nodes in few traces; none of them is known to write to an operand."""
    numbers = _Numbers()
    on_numbers = [node for node in nodes if not brings_gradients(node)]
    if not any(map(numbers.stand_in, on_numbers)):
        return _decompose_together(owner, nodes, fake_value)
    found = _decompose_together(owner, on_numbers, numbers.value)
    on_sizes = [node for node in nodes if node not in found or _is_asked_for_sizes(found[node])]
    return found | _decompose_together(owner, on_sizes, fake_value)


class _Numbers:
    """Values with the captured numbers in place of sizes that are only known at run time."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[Any, Any]] = {}

    def stand_in(self, node: Node) -> bool:
        """Return whether they take the place of a node's operands."""
        leaves = [leaf for operand in operands_read(node) for leaf in tree_leaves(fake_value(operand))]
        return any(self._leaf(leaf) is not leaf for leaf in leaves)

    def value(self, operand: Node) -> Any:
        """Return the value of an operand."""
        return tree_map(self._leaf, fake_value(operand))

    def _leaf(self, leaf: Any) -> Any:
        if id(leaf) not in self._known:
            self._known[id(leaf)] = (leaf, _on_numbers(leaf))
        return self._known[id(leaf)][1]


def _on_numbers(leaf: Any) -> Any:
    """Return a value at the captured sizes; as it is where it has none that vary, or depends on the data."""
    if isinstance(leaf, torch.SymInt):
        return leaf if depends_on_data(leaf) else hint(leaf)
    if type(leaf) is not FakeTensor or leaf.layout != torch.strided:
        return leaf
    sizes = (*leaf.shape, *leaf.stride())
    if not any(map(is_symbolic, sizes)) or any(map(depends_on_data, sizes)):
        return leaf
    with leaf.fake_mode:
        value = torch.empty_strided(
            list(map(hint, leaf.shape)), list(map(hint, leaf.stride())), dtype=leaf.dtype, device=leaf.device
        )
    return value.requires_grad_(leaf.requires_grad)


def _is_asked_for_sizes(found: Decomposed | None) -> bool:
    """Return whether a node must be decomposed on its sizes: it may hold attention, or has made a constant of one."""
    if found is None or any(op.op == "get_attr" for op in found.ops):
        return True
    products = [op for op in found.ops if op.target in CONTRACTIONS]
    return len(products) > 1 or any(op.target not in ONE_PRODUCT for op in products)


def _decompose_together(
    owner: GraphModule, nodes: Sequence[Node], value_of: Callable[[Node], Any]
) -> dict[Node, Decomposed | None]:
    """Decompose several nodes in one trace, on these values of their operands.

    The trace returns the tensors of the nodes one after the other, `counts` of each: 0 for a node that cannot be
    traced. A node that writes to memory of its own is decomposed once more, alone and without the writes, as a whole
    region is.
    """
    operands = {operand: value_of(operand) for node in nodes for operand in operands_read(node)}
    things: dict[Node, Any] = {}
    for held in held_by(nodes):
        things[held] = execute(owner, held, things)
    leaves = {id(leaf): leaf for leaf in tree_leaves(list(operands.values()))}  # a trace tells values by identity
    counts: list[int] = []
    written: list[frozenset[int]] = []

    def run(*values: Any) -> list[Any]:
        given = dict(zip(leaves, values, strict=True))
        env = {operand: tree_map(lambda leaf: given[id(leaf)], value) for operand, value in operands.items()}
        env |= things
        made: list[torch.Tensor] = []
        for node in nodes:
            tensors, changed = _run(owner, node, env)
            counts.append(len(tensors))
            written.append(changed)
            made += tensors
        return made

    with tracing(list(leaves.values())):
        graph = traced(run, list(leaves.values()), decompositions(gathers=False)).graph
    placeholder_of = dict(zip(leaves, _placeholders(graph), strict=True))
    returned: Any = graph.output_node().args[0]
    results = iter(returned)
    decomposed: dict[Node, Decomposed | None] = {}
    for node, count, changed in zip(nodes, counts, written, strict=True):
        read = enumerate(tree_leaves(operands.get(operand, ())) for operand in node.all_input_nodes)
        position_of = {placeholder_of[id(leaf)]: position for position, given in read for leaf in given}
        found = _ops_of(graph, position_of, list(islice(results, count)))
        if changed:
            found = replace(found or Decomposed(position_of, (), understood=False), written=changed)
        decomposed[node] = found
    return decomposed | _without_writes(owner, graph, decomposed)


def _run(owner: GraphModule, node: Node, env: Mapping[Node, Any]) -> tuple[Sequence[torch.Tensor], frozenset[int]]:
    """Run one node; return its tensors, and the positions of the operands that it wrote to.

    A node that cannot be traced, as the user's op may do anything, gives no tensors, and may have written to all.
    """

    def versions() -> list[tuple[int, ...]]:
        leaves = [tree_leaves(env[operand]) for operand in node.all_input_nodes]  # a subgraph has none
        return [tuple(x._version for x in each if isinstance(x, torch.Tensor)) for each in leaves]

    before, unknown, tensors = versions(), False, list[torch.Tensor]()
    watch = _Writes()
    try:
        with watch if _may_write(node) else nullcontext():
            value = (execute_with_own_gradients if brings_gradients(node) else execute)(owner, node, env)
        tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor)]
        unknown = watch.seen  # a write through `.data` changes no version
    except Exception as error:
        log.debug("mst_fx: %s is not understood: %s", node, error)
        unknown = _may_write(node)
    changes = enumerate(zip(before, versions(), strict=True))
    return tensors, frozenset(position for position, (old, new) in changes if unknown or old != new)


class _Writes(TorchDispatchMode):
    """Records whether an op writes to an operand."""

    seen = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one op."""
        self.seen |= is_mutable(func)
        return func(*args, **(kwargs or {}))


def _may_write(node: Node) -> bool:
    """Return whether neither schema nor name tells what a function writes to: functions of the user, or of NumPy."""
    target: Any = node.target.op if isinstance(node.target, OnDTensors) else node.target
    module = getattr(target, "__module__", None) or ("torch" if isinstance(target, str) else "")
    return node.op == "call_function" and (not module.startswith("torch") or module.startswith("torch._dynamo"))


def _without_writes(
    owner: GraphModule, graph: Graph, decomposed: Mapping[Node, Decomposed | None]
) -> dict[Node, Decomposed]:
    """Decompose the nodes that write to memory of their own once more, each alone."""
    memory = {operand for op in graph.nodes if mutates(op) for operand in op.all_input_nodes}
    found = {}
    for node, dirty in decomposed.items():
        if dirty is not None and not memory.isdisjoint((*dirty.ops, *dirty.backward)):
            alone = decompose_alone(owner, node, node) or replace(dirty, understood=False)
            found[node] = replace(alone, written=dirty.written)
    return found


def _placeholders(graph: Graph) -> list[Node]:
    return [node for node in graph.nodes if node.op == "placeholder"]


def _ops_of(graph: Graph, position_of: dict[Node, int], results: Sequence[Node]) -> Decomposed | None:
    """Collect the ops of a traced graph that make one node's results; None where there are no results.

    Args:
        graph: the traced graph.
        position_of: as in `Decomposed`.
        results: what the node gives.
    """
    if not results:
        return None
    found = {op for op in ancestors(results) if op.op != "placeholder"}
    ops = found & ancestors(results, read_forward)
    return Decomposed(position_of, in_order(graph, ops), in_order(graph, found - ops))
