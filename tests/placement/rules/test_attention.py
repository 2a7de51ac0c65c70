"""Attention in one kernel: how queries, keys, values and masks lie, where one of them is split.

Axes: B batch, H heads, G heads of the keys, T tokens, D features.
"""

from __future__ import annotations

import pytest
import torch
from torch.fx import Graph

from mst_fx.core.aten_ops import ATTENTIONS
from mst_fx.core.refusal import Reason, Refusal
from mst_fx.placement.placement import WHOLE, Split
from mst_fx.placement.propagate import propagate
from mst_fx.placement.rules import Spans

aten = torch.ops.aten
B, H, T, D = 2, 8, 16, 8
FLASH = aten._scaled_dot_product_flash_attention.default
EFFICIENT = aten._scaled_dot_product_efficient_attention.default


def placed(seed, split, keys=4, mask=None, op=FLASH):
    """Placements of (query, key, value[, mask]) and of the results, where one operand is split."""
    graph = Graph()
    shapes = {
        "query": (B, H, T, D),
        "key": (B, keys, T, D),
        "value": (B, keys, T, D),
        **({"mask": mask} if mask else {}),
    }
    nodes = {name: graph.placeholder(name) for name in shapes}
    for name, node in nodes.items():
        node.meta["val"] = torch.empty(shapes[name], device="meta")
    more = (nodes.get("mask"), True) if op == EFFICIENT else ()
    result = graph.call_function(op, (nodes["query"], nodes["key"], nodes["value"], *more))
    of_head, of_query = (torch.empty(shape, device="meta") for shape in ((B, H, T, D), (B, H, T)))
    result.meta["val"] = (of_head, of_query, *[None] * (len(op._schema.returns) - 2))
    graph.output(result)
    placements = propagate(graph, {nodes[seed]: split}).of
    return [placements[node] for node in nodes.values()], placements[result][:2]


@pytest.mark.parametrize("op", [FLASH, EFFICIENT])
@pytest.mark.parametrize("seed", ["query", "key", "value"])
def test_a_head_of_the_keys_has_the_queries_that_share_it(op, seed):
    split = Split(1, 1, 2 if seed == "query" else 1)
    operands, results = placed(seed, split, op=op)
    assert operands == [Split(1, 1, 2), Split(1), Split(1)]
    assert results == (Split(1, 1, 2), Split(1, 1, 2))


def test_all_queries_share_the_keys_of_one_head():
    assert placed("query", Split(1), keys=1) == ([Split(1), WHOLE, WHOLE], (Split(1), Split(1)))


def test_sequences_of_a_batch_are_apart():
    assert placed("key", Split(0)) == ([Split(0)] * 3, (Split(0), Split(0)))


@pytest.mark.parametrize(("mask", "split"), [((B, 1, T, T), WHOLE), ((1, H, T, T), Split(1, 1, 2)), ((T, T), WHOLE)])
def test_a_mask_of_each_head_is_split(mask, split):
    operands, _ = placed("query", Split(1, 1, 2), mask=mask, op=EFFICIENT)
    assert operands[-1] == split


def test_half_a_group_of_queries_has_no_keys_of_its_own():
    with pytest.raises(Spans) as spans:
        placed("query", Split(1))
    assert spans.value.factors == [(1, 2)]


@pytest.mark.parametrize(("seed", "dim"), [("query", 2), ("key", 2), ("value", 3)])
def test_tokens_and_features_are_not_apart(seed, dim):
    with pytest.raises(Refusal) as refusal:
        placed(seed, Split(dim))
    assert refusal.value.reason == Reason.AXIS_MIXED


def test_each_kernel_has_gradients_of_queries_keys_and_values():
    from mst_fx.core.aten_ops import ATTENTION_GRADIENTS

    for op in ATTENTIONS:
        given = {argument.name for argument in ATTENTION_GRADIENTS[op]._schema.arguments}
        assert {"query", "key", "value", "out", "logsumexp"} <= given
