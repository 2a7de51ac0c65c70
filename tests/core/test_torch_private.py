"""What Dynamo leaves on the graphs that it has captured."""

from __future__ import annotations

import torch
from torch.fx import Graph, GraphModule

from mst_fx.core.torch_private.captured import graph_break


def test_why_a_graph_ended():
    told = []

    def broken_in_two(x):
        y = x + 1
        torch._dynamo.graph_break()
        return y * 2

    torch.compile(broken_in_two, backend=lambda gm, _: told.append(graph_break(gm)) or gm)(torch.ones(2))
    assert "graph_break" in told[0]
    assert told[1:] == [""]
    assert graph_break(GraphModule({}, Graph())) == ""
