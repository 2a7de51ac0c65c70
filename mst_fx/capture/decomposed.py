"""What single nodes of a captured graph open into: the aten ops that each amounts to, by itself.

A trace costs milliseconds, one op in it a fraction of one: so all nodes are traced together, yet apart from each other,
each on the values that were captured.

Private torch API: dispatch modes, versions of values. Run on torch 2.11, 2.13 and 2.15.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from mst_fx.capture.decompositions import openings
from mst_fx.capture.lower import execute, lower, mutates, traced, tracing
from mst_fx.core.aten_ops import is_mutable
from mst_fx.core.graph_walk import ancestors, in_order
from mst_fx.core.modes import Mode
from mst_fx.core.values import fake_value

log = logging.getLogger("mst_fx")


@dataclass(frozen=True)
class Opened:
    """The aten graph of one node.

    Attributes:
        position_of: for each placeholder which of the node's operands (`all_input_nodes`) it stands for.
        ops: the nodes of the graph but placeholders, in its order.
        written: the operands that it was seen to write to.
        understood: False where nothing else is known of it.
    """

    position_of: dict[Node, int]
    ops: tuple[Node, ...]
    written: frozenset[int] = frozenset()
    understood: bool = True


def open_alone(owner: GraphModule, node: Node, result: Node) -> Opened | None:
    """What one node opens into, None where it cannot be traced.

    Args:
        owner: the module that the node's graph belongs to.
        node: it may write to an operand.
        result: the node itself, or the operand that it writes to if it has no value of its own.
    """
    try:
        lowered = lower(owner, [node], node.all_input_nodes, [result], {node: Mode()}, gathers=False)
    except Exception as error:  # the user's op may do anything
        log.debug("mst_fx: %s is not understood: %s", node, error)
        return None
    operands = enumerate(node.all_input_nodes)
    positions = [position for position, operand in operands for _ in tree_leaves(fake_value(operand))]
    position_of = dict(zip(_placeholders(lowered.graph), positions, strict=True))
    return _slice(lowered.graph, position_of, lowered.graph.output_node().all_input_nodes)


def open_together(owner: GraphModule, nodes: Sequence[Node]) -> dict[Node, Opened | None]:
    """What each of several nodes opens into; none of them is known to write to an operand.

    The trace gives the tensors of one node behind those of another, as many of each as `counts` says: none of a node
    that cannot be traced. One that writes to memory of its own is opened alone, as a whole region is: without the
    writes.
    """
    operands = {operand: fake_value(operand) for node in nodes for operand in node.all_input_nodes}
    leaves = {id(leaf): leaf for leaf in tree_leaves(list(operands.values()))}  # a trace tells values by identity
    counts: list[int] = []
    written: list[frozenset[int]] = []

    def run(*values: Any) -> list[Any]:
        given = dict(zip(leaves, values, strict=True))
        env = {operand: tree_map(lambda leaf: given[id(leaf)], value) for operand, value in operands.items()}
        made: list[torch.Tensor] = []
        for node in nodes:
            tensors, changed = _run(owner, node, env)
            counts.append(len(tensors))
            written.append(changed)
            made += tensors
        return made

    with tracing(list(leaves.values())):
        graph = traced(run, list(leaves.values()), openings(gathers=False)).graph
    placeholder_of = dict(zip(leaves, _placeholders(graph), strict=True))
    returned: Any = graph.output_node().args[0]
    results = iter(returned)
    opened: dict[Node, Opened | None] = {}
    for node, count, changed in zip(nodes, counts, written, strict=True):
        read = enumerate(map(tree_leaves, map(operands.__getitem__, node.all_input_nodes)))
        position_of = {placeholder_of[id(leaf)]: position for position, parts in read for leaf in parts}
        found = _slice(graph, position_of, list(islice(results, count)))
        if changed:
            found = replace(found or Opened(position_of, (), understood=False), written=changed)
        opened[node] = found
    return opened | _without_writes(owner, graph, opened)


def _run(owner: GraphModule, node: Node, env: Mapping[Node, Any]) -> tuple[Sequence[torch.Tensor], frozenset[int]]:
    """The tensors that one node gives, and the operands that it has written to.

    Nothing is given where it cannot be traced, as the user's op may do anything; it may have written to all of them.
    """

    def versions() -> list[tuple[int, ...]]:
        parts = [tree_leaves(env[operand]) for operand in node.all_input_nodes]
        return [tuple(x._version for x in each if isinstance(x, torch.Tensor)) for each in parts]

    before, unknown, tensors = versions(), False, list[torch.Tensor]()
    watch = _Writes()
    try:
        with watch if _may_write(node) else nullcontext():
            value = execute(owner, node, env)
        tensors = [part for part in tree_leaves(value) if isinstance(part, torch.Tensor)]
        unknown = watch.seen  # through `.data` no version changes
    except Exception as error:
        log.debug("mst_fx: %s is not understood: %s", node, error)
        unknown = _may_write(node)
    changes = enumerate(zip(before, versions(), strict=True))
    return tensors, frozenset(position for position, (old, new) in changes if unknown or old != new)


class _Writes(TorchDispatchMode):
    """Notices ops that write to an operand."""

    seen = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run one op."""
        self.seen |= is_mutable(func)
        return func(*args, **(kwargs or {}))


def _may_write(node: Node) -> bool:
    """Whether neither a schema nor a name tells what a function writes to: the user's own, and those of NumPy."""
    module = getattr(node.target, "__module__", None) or ""
    return node.op == "call_function" and (not module.startswith("torch") or module.startswith("torch._dynamo"))


def _without_writes(owner: GraphModule, graph: Graph, opened: Mapping[Node, Opened | None]) -> dict[Node, Opened]:
    """What nodes open into that write to memory of their own, each opened anew by itself."""
    memory = {operand for op in graph.nodes if mutates(op) for operand in op.all_input_nodes}
    found = {}
    for node, dirty in opened.items():
        if dirty is not None and not memory.isdisjoint(dirty.ops):
            alone = open_alone(owner, node, node) or replace(dirty, understood=False)
            found[node] = replace(alone, written=dirty.written)
    return found


def _placeholders(graph: Graph) -> list[Node]:
    return [node for node in graph.nodes if node.op == "placeholder"]


def _slice(graph: Graph, position_of: dict[Node, int], results: Sequence[Node]) -> Opened | None:
    """The part of a traced graph that makes some results; None where there are none.

    Args:
        graph: that was traced.
        position_of: as in `Opened`.
        results: what the node gives.
    """
    if not results:
        return None
    found = {op for op in ancestors(results) if op.op != "placeholder"}
    return Opened(position_of, in_order(graph, found))
