"""Products at the end of a body leave it as their factors."""

from __future__ import annotations

import pytest
import torch
from looping import Call, check_loop, learnt, values

from mst_fx.bodies.body import Gradients, gradient_body
from mst_fx.core.aten_ops import PRODUCTS

WEIGHTS = {
    "x @ w": lambda: (lambda x, w, b: x @ w + b, learnt(4, 6)),
    "x @ w.t()": lambda: (lambda x, w, b: x @ w.t() + b, learnt(6, 4)),
    "columns in memory": lambda: (lambda x, w, b: x @ w + b, values(6, 4).t().requires_grad_()),
    "a matrix for each of a batch": lambda: (
        lambda x, w, b: (torch.bmm(x.expand(3, -1, -1), w) + b).sum(0),
        learnt(3, 4, 6),
    ),
    "the same, transposed": lambda: (
        lambda x, w, b: (torch.bmm(x.expand(3, -1, -1), w.mT) + b).sum(0),
        learnt(3, 6, 4),
    ),
}


@pytest.mark.parametrize("weight", WEIGHTS)
def test_a_weight_gradient_leaves_the_body_as_two_factors(weight):
    function, w = WEIGHTS[weight]()
    stages = check_loop(Call(function, [learnt(7, 4), w, learnt(6)]), 4)
    body = gradient_body(stages, Gradients((1, 2), (0,), False, "float32"), 4)
    assert [kind.name for kind in body.outs] == ["outer", "sum"]
    assert not any(node.target in PRODUCTS for node in body.module.graph.nodes)
