"""Which nodes are alike."""

from __future__ import annotations

import torch
from graphs import captured

from mst_fx.capture.fingerprint import likeness_of_node


def test_nodes_that_read_one_tensor_and_two_are_not_alike():
    def program(x, y):
        return x * x.contiguous() + x * y.contiguous() + y * y.contiguous()

    gm = captured(program, torch.randn(3, 4), torch.randn(3, 4))
    one, two, other = (likeness_of_node(node) for node in gm.graph.nodes if "mul" in str(node.target))
    assert one == other != two
