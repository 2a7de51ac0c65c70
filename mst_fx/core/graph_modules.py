"""Graph modules: copies, modules over new graphs, and what their nodes hold that is no value."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import is_dataclass
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

from mst_fx.core.graph_walk import ancestors, in_order
from mst_fx.core.torch_private.captured import make_graph_module

aten = torch.ops.aten


def module_over(owner: GraphModule, graph: Graph) -> GraphModule:
    """Return a module that runs the graph on the attributes of `owner`.

    Within torch.compile it writes its code on the first run; the compiler never runs it.
    """
    return make_graph_module(owner, graph, owner.__class__.__name__)


def copied(module: GraphModule) -> GraphModule:
    """Return a copy of the module, with a graph of its own over the same attributes."""
    graph = Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    return module_over(module, graph)


def take_over(gm: GraphModule, changed: GraphModule) -> None:
    """Give a graph, in place, the nodes and subgraphs of a changed copy of it; its own placeholders stay.

    Compilers read what the one who captured the graph has left on placeholders.
    """
    graph = gm.graph
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    for node in reversed(graph.nodes):
        if node.op != "placeholder":
            graph.erase_node(node)
    taken = [node for node in changed.graph.nodes if node.op == "placeholder"]
    node_of = dict(zip(taken, placeholders, strict=True))
    for node in changed.graph.nodes:
        if node.op != "placeholder":
            node_of[node] = graph.node_copy(node, node_of.__getitem__)
    reads = (str(node.target) for node in graph.nodes if node.op in ("get_attr", "call_module"))
    read = dict.fromkeys(target.partition(".")[0] for target in reads)  # in order, for the keys of caches
    for name in dict(gm.named_children()):
        if name not in read:
            delattr(gm, name)
    for name in read:
        setattr(gm, name, getattr(changed, name))
    graph.lint()
    gm.recompile()


def layout_free(target: Any) -> Any:
    """Return `reshape` for `view`, other ops as they are: not every kernel gives the memory layout that was traced.

    Compilers turn a reshape into a view where the layout allows one.
    """
    return aten.reshape.default if target == aten.view.default else target


def held_graph(node: Node) -> GraphModule | None:
    """Return the subgraph that a node reads from its module; None for any other node."""
    owner: Any = node.graph.owning_module
    held = getattr(owner, str(node.target), None) if node.op == "get_attr" else None
    return held if isinstance(held, GraphModule) else None


def makes_settings(node: Node) -> bool:
    """Return whether a node makes a named tuple or a dataclass of constants, as FX writes a function's settings."""
    if node.op != "call_function" or not isinstance(node.target, type):
        return False
    is_written = issubclass(node.target, tuple) or is_dataclass(node.target)
    return is_written and all(map(makes_settings, node.all_input_nodes))


def is_held(node: Node) -> bool:
    """Return whether a node gives what is no value: a subgraph, or settings. It runs along with its reader."""
    return held_graph(node) is not None or makes_settings(node)


def held_by(nodes: Iterable[Node]) -> list[Node]:
    """Return the subgraphs and settings that nodes read, in graph order, with the settings that those are made of."""
    read = [operand for node in nodes for operand in node.all_input_nodes if is_held(operand)]
    return list(in_order(read[0].graph, ancestors(read))) if read else []


def operands_read(node: Node) -> list[Node]:
    """Return the operands of a node that are values: no subgraphs and no settings."""
    return [operand for operand in node.all_input_nodes if not is_held(operand)]
