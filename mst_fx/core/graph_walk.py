"""Walks over the nodes of a graph: what values are made of, and what is made of them."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator
from typing import TypeAlias

from torch.fx import Graph, Node

Neighbours: TypeAlias = Callable[[Node], Iterable[Node]]


def operands_of(node: Node) -> list[Node]:
    """All nodes that a node reads."""
    return node.all_input_nodes


def walk(nodes: Iterable[Node], neighbours: Neighbours) -> Iterator[Node]:
    """The nodes, and all that is reached from them; each once, the last one that was found first.

    A node is given before its neighbours are asked for.
    """
    pending, met = list(nodes), set[Node]()
    while pending:
        node = pending.pop()
        if node not in met:
            met.add(node)
            yield node
            pending += neighbours(node)


def ancestors(
    nodes: Iterable[Node], reads: Neighbours = operands_of, stop: Callable[[Node], bool] = lambda node: False
) -> set[Node]:
    """The nodes, and what they are made of.

    Args:
        nodes: to start from; they are in the result whatever `stop` says.
        reads: which operands of a node count.
        stop: says of an operand that it is left out, and all that is only reached through it.
    """
    return set(walk(nodes, lambda node: (operand for operand in reads(node) if not stop(operand))))


def descendants(nodes: Iterable[Node], readers: Neighbours = lambda node: node.users) -> set[Node]:
    """The nodes, and what is made of them.

    Args:
        nodes: to start from.
        readers: which users of a node count.
    """
    return set(walk(nodes, readers))


def between(sources: Container[Node], end: Node) -> tuple[Node, ...]:
    """The calls that make `end` of the sources, `end` among them, in graph order; inputs of the graph are left out."""

    def is_outside(node: Node) -> bool:
        return node in sources or node.op != "call_function"

    return () if is_outside(end) else in_order(end.graph, ancestors([end], stop=is_outside))


def in_order(graph: Graph, nodes: Container[Node]) -> tuple[Node, ...]:
    """The nodes of a graph that are among these, in its order."""
    return tuple(node for node in graph.nodes if node in nodes)
