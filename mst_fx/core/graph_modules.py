"""Graph modules: copies, and modules over new graphs."""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node

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


def subgraphs_read(node: Node) -> list[Node]:
    """Return the operands of a node that are subgraphs."""
    return [operand for operand in node.all_input_nodes if held_graph(operand) is not None]


def operands_read(node: Node) -> list[Node]:
    """Return the operands of a node that are values, and no subgraphs."""
    return [operand for operand in node.all_input_nodes if held_graph(operand) is None]
