"""Walks over the nodes of a graph, from values to what they are made of and to what is made of them."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator
from typing import TypeAlias

from torch.fx import Graph, Node

Neighbours: TypeAlias = Callable[[Node], Iterable[Node]]


def operands_of(node: Node) -> list[Node]:
    """Return all nodes that a node reads."""
    return node.all_input_nodes


def walk(nodes: Iterable[Node], neighbours: Neighbours) -> Iterator[Node]:
    """Yield the nodes and all that they reach, each once, depth first.

    The walk yields a node before it asks for the node's neighbours.
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
    """Return the nodes, and what they are made of.

    Args:
        nodes: the walk starts from them; they are returned whatever `stop` says.
        reads: gives the operands of a node that count.
        stop: says whether to leave out an operand, and all that only it leads to.
    """
    return set(walk(nodes, lambda node: (operand for operand in reads(node) if not stop(operand))))


def descendants(nodes: Iterable[Node], readers: Neighbours = lambda node: node.users) -> set[Node]:
    """Return the nodes, and what is made of them.

    Args:
        nodes: the walk starts from them.
        readers: gives the users of a node that count.
    """
    return set(walk(nodes, readers))


def between(starts: Container[Node], end: Node) -> tuple[Node, ...]:
    """Return the calls that make `end` from the starts, `end` included, in graph order, without the graph's inputs."""

    def is_outside(node: Node) -> bool:
        return node in starts or node.op != "call_function"

    return () if is_outside(end) else in_order(end.graph, ancestors([end], stop=is_outside))


def in_order(graph: Graph, nodes: Container[Node]) -> tuple[Node, ...]:
    """Return the nodes of a graph that are among `nodes`, in graph order."""
    return tuple(node for node in graph.nodes if node in nodes)
