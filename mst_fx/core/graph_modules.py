"""Graphs and the modules that run them.

Private torch API: modules whose code is written late. Run on torch 2.11, 2.13 and 2.15.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.fx import Graph, GraphModule
from torch.fx._lazy_graph_module import _make_graph_module

aten = torch.ops.aten


def module_over(owner: GraphModule, graph: Graph) -> GraphModule:
    """A module that runs the graph on the attributes of another one.

    Within torch.compile its code is written when somebody runs it, which the compiler does not.
    """
    return _make_graph_module(owner, graph, owner.__class__.__name__)


def copied(module: GraphModule) -> GraphModule:
    """A module of its own over the same attributes."""
    graph = Graph()
    graph.output(graph.graph_copy(module.graph, {}))
    return module_over(module, graph)


def layout_free(target: Any) -> Any:
    """An op that takes any memory layout in place of one that takes the traced one: not every kernel keeps to it.

    Compilers make a view of it wherever a view serves.
    """
    return aten.reshape.default if target == aten.view.default else target
