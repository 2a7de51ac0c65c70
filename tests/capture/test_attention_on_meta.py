"""Attention on shapes alone is the op that a GPU runs. Eight tokens, four heads of 16 features."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch._subclasses.fake_tensor import FakeTensorMode

from mst_fx.capture.lower import traced, tracing
from mst_fx.core.aten_ops import ATTENTIONS

aten = torch.ops.aten
FLASH, EFFICIENT, _, OF_CPU, *_ = ATTENTIONS
PRODUCTS = aten.bmm.default
HALF, SINGLE, DOUBLE = torch.bfloat16, torch.float32, torch.float64
attend = F.scaled_dot_product_attention


def by_aten(q, k, v):
    return aten.scaled_dot_product_attention.default(q, k, v)


def in_one_module(q, k, v):
    x, *_ = (x[0].transpose(0, 1).flatten(1) for x in (q, k, v))
    weight, out = x.new_empty(3 * x.shape[1], x.shape[1]), x.new_empty(x.shape[1], x.shape[1])
    given = (x.shape[1], 4, weight, None, None, None, False, 0.0, out, None)
    return F.multi_head_attention_forward(x, x, x, *given, need_weights=False)[0]


def masked(dtype):
    return lambda q, k, v: attend(q, k, v, q.new_ones(8, 8).to(dtype))


def causal(q, k, v):
    return attend(q, k, v, is_causal=True)


def grouped(q, k, v):
    return attend(q, k, v, enable_gqa=True)


@pytest.mark.parametrize(
    ("function", "expected", "dtype", "sizes"),
    [
        (causal, FLASH, HALF, {}),
        (grouped, FLASH, HALF, {"heads": 2}),
        (by_aten, FLASH, HALF, {}),
        (in_one_module, FLASH, HALF, {}),
        (attend, EFFICIENT, SINGLE, {}),
        (attend, EFFICIENT, HALF, {"features": 512}),
        (causal, EFFICIENT, HALF, {"tokens": 6}),
        (masked(torch.bool), EFFICIENT, HALF, {}),
        (masked(HALF), EFFICIENT, HALF, {}),
        (grouped, PRODUCTS, SINGLE, {"heads": 2}),
        (attend, PRODUCTS, DOUBLE, {}),
        (attend, OF_CPU, DOUBLE, {"device": "cpu"}),
    ],
)
def test_the_kernel_of_a_gpu(function, expected, dtype, sizes):
    """Keys may have fewer heads than queries, or be fewer."""
    given = {"heads": 4, "tokens": 8, "features": 16, "device": "meta", **sizes}
    with FakeTensorMode():
        q = torch.empty(1, 4, 8, given["features"], dtype=dtype, device=given["device"])
        k, v = q.new_empty(2, 1, given["heads"], given["tokens"], given["features"])
    with tracing([q, k, v]):
        graph = traced(function, [q, k, v]).graph
    made = {node.target for node in graph.nodes} & {*ATTENTIONS, PRODUCTS}
    assert made == {expected}
