"""What a node is, however the user spelled it: contractions and their factors, views, repeats, writes, obstacles."""

from __future__ import annotations

import operator

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from graphs import captured, sketched
from looping import returned
from torch import nn

from mst_fx.core.refusal import Reason
from mst_fx.core.sizes import is_size
from mst_fx.recognise.contractions import Contraction
from mst_fx.recognise.reader import Reader

aten = torch.ops.aten
B, T, D, FF, R = 2, 5, 4, 8, 2


def read(fn, *shapes):
    """A reader of the function's graph, its inputs, and what it returns."""
    gm = sketched(fn, *(torch.randn(shape, requires_grad=True) for shape in shapes))
    return Reader(gm), gm.graph.find_nodes(op="placeholder"), returned(gm)


SPELLINGS = {
    "linear": lambda x, w: F.linear(x, w.t()),
    "matmul": lambda x, w: x @ w,
    "addmm": lambda x, w: torch.addmm(x.new_zeros(FF), x.flatten(0, 1), w),
    "einsum": lambda x, w: torch.einsum("btd,df->btf", x, w),
    "tensordot": lambda x, w: torch.tensordot(x, w, ([2], [0])),
    "convolution": lambda x, w: F.conv1d(x.mT, w.t().unsqueeze(-1)),
    "from the left": lambda x, w: w.t() @ x.flatten(0, 1).t(),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_product_of_tokens_and_a_weight_however_it_is_spelled(spelling):
    reader, (x, w), (node,) = read(SPELLINGS[spelling], (B, T, D), (D, FF))
    found = reader.contraction(node)
    assert not found.grouped
    assert (reader.unviewed(found.activation), reader.unviewed(found.weight)) == (x, w)
    assert reader.widening(node) == found


@pytest.mark.parametrize(
    "other",
    [
        lambda x, y: x + y,
        lambda x, y: (x * 2) @ (y * 2).mT,  # as in attention
        lambda x, y: x @ y.mT,  # either may hold a matrix for each group
        lambda x, y: (lambda rows: rows @ rows)(x[0]),
        lambda x, y: torch.einsum("btd,bsd,bse->bte", x, y, y),
    ],
)
def test_what_is_no_product_of_tokens_and_a_weight(other):
    reader, _, (node,) = read(other, (T, T, T), (T, T, T))
    assert reader.contraction(node) is None


def test_one_matrix_for_each_group_is_a_weight_too():
    reader, (_, w), (node,) = read(lambda x, w: torch.bmm(x * 2, w), (B, T, D), (B, D, FF))
    found = reader.contraction(node)
    assert (found.weight, found.grouped) == (w, True)


class Merged(nn.Module):
    """An adapter whose factors are multiplied with each other before they meet the tokens."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(T, R)), nn.Parameter(torch.randn(R, FF))

    def forward(self, x):
        merged = self.a * 2 @ self.b
        return merged, merged @ (x + 1)


def test_what_is_made_of_parameters_alone_is_a_weight():
    gm = sketched(Merged(), torch.randn(FF, D))
    reader, (merged, product) = Reader(gm), returned(gm)
    assert reader.contraction(merged) is None
    (tokens,) = (node for node in product.all_input_nodes if node is not merged)
    assert reader.contraction(product) == Contraction(tokens, merged)


def test_an_adapter_restores_what_it_has_projected_and_widens_nothing():
    def adapted(x, a, b, wide):
        low = (x @ a) * 0.5
        return low, low @ b, low.tanh() @ wide

    reader, (x, *_), (low, same, wider) = read(adapted, (T, D), (D, R), (R, D), (R, FF))
    assert [reader.contraction(node) is not None for node in (low, same, wider)] == [False, True, True]
    assert [reader.widening(node) is not None for node in (same, wider)] == [False, True]
    assert reader.unprojected(low) is x


def test_a_narrow_value_counts_as_what_it_was_widened_from():
    def bottleneck(x, up, down, same, wide):
        narrow = F.gelu(x @ up) @ down
        return narrow, narrow @ same, narrow @ wide

    reader, (x, *_), (narrow, same, wider) = read(bottleneck, (T, D), (D, FF), (FF, R), (R, D), (R, FF))
    assert reader.unprojected(narrow) is x
    assert [reader.widening(node) is not None for node in (same, wider)] == [False, True]


def test_what_a_value_views_or_casts():
    def viewed(x):
        first, second = x.double().transpose(0, 1).chunk(2, -1)
        return first.clone(), second.float() + 1, x.t().contiguous()

    reader, (x,), (copied, added, rows) = read(viewed, (T, D))
    assert reader.unviewed(copied).target is operator.getitem  # one of several values
    assert reader.unviewed(added) is added
    assert reader.unviewed(rows) is x


def test_what_repeats_rows():
    def repeated(x, twice, once):
        return x.repeat(3, 1), x[twice], x.index_select(0, once), x.expand(3, T, D), x.repeat(3, 1) * 2

    gm = sketched(repeated, torch.randn(T, D), torch.arange(2 * T) // 2, torch.arange(T))
    reader, (x, *_) = Reader(gm), gm.graph.nodes
    assert [reader.repeats(node) for node in returned(gm)] == [x, x, None, None, None]


def test_what_makes_new_memory():
    def made(x):
        return x.new_empty(2), torch.zeros_like(x), x.new_ones(3), x * 0, x.clone()

    reader, _, nodes = read(made, (T, D))
    assert [reader.fills(node) for node in nodes] == [True] * 3 + [False] * 2


def test_ops_are_told_without_those_that_compute_sizes():
    x = torch.randn(B, 2, T, D)
    torch._dynamo.mark_dynamic(x, 2)
    gm = captured(lambda x: torch.matmul(x, x.mT).relu(), x)
    reader, (relu,) = Reader(gm), returned(gm)
    (scores,) = relu.all_input_nodes
    assert any(is_size(op.meta["val"]) for op in reader.decomposed(scores).ops)
    assert all(op.namespace == "aten" and "size" not in str(op) for op in reader.ops(scores))
    assert reader.does(relu, (aten.relu.default, aten.gelu.default))
    assert not reader.does(relu, (aten.gelu.default,))


def test_elements_of_a_tuple_are_counted_together():
    reader, _, (largest,) = read(lambda x: torch.max(x, -1)[0], (T, D))
    (pair,) = largest.all_input_nodes
    assert (reader.numel(pair), reader.numel(largest)) == (2 * T, T)
    assert (reader.rank(pair), reader.rank(largest)) == (-1, 1)


@pytest.mark.parametrize(
    ("program", "reason", "text"),
    [
        (lambda x: torch.fft.fft(x), Reason.UNKNOWN_OP, "fft_fft: "),
        (lambda x: torch.normal(x, 0.1), Reason.RANDOM, "normal"),
        (lambda x: x[[0, 2] * 33], Reason.UNKNOWN_OP, "getitem holds a constant tensor"),
        (lambda x: F.gelu(x), None, ""),
        (lambda x: x.clone().mul_(2), None, ""),  # a write to an operand is no effect of the region
    ],
)
def test_what_keeps_a_node_out_of_regions(program, reason, text):
    reader, _, (node,) = read(program, (T, D))
    refusal = reader.obstacle(node)
    assert (refusal and refusal.reason) == reason
    assert text in (refusal.text if refusal else "")


def test_nodes_that_only_compute_their_value():
    def program(x):
        y = x * 2
        return y.exp(), y.add_(1), torch.rand_like(y)

    reader, _, nodes = read(program, (T, D))
    assert [reader.is_known(node) for node in nodes] == [True, True, False]
    assert [reader.is_pure(node) for node in nodes] == [True, False, False]
    assert [bool(reader.written_by(node)) for node in nodes] == [False, True, False]


def scaled_in_place(x):
    x.mul_(2)
    return x + 0


torch.fx.wrap("scaled_in_place")


def test_writes_that_neither_name_nor_schema_tell():
    """The trace that decomposed the node has seen them."""
    reader, _, (node,) = read(lambda x: scaled_in_place(x * 1), (T, D))
    assert reader.written_by(node) == tuple(node.all_input_nodes)
    assert not reader.is_pure(node)


def test_changes_in_place_that_are_looked_for_everywhere():
    def program(x):
        tokens, other, third = x * 1, x * 2, x * 3
        tokens.detach_()
        other.transpose_(0, 1)
        third.data.add_(1)
        third.add_(1)
        return tokens, other, third

    gm = captured(program, torch.randn(T, D))
    reader = Reader(gm)
    detached, turned, written, _ = (node for node in gm.graph.nodes if reader.written_by(node))
    assert reader.switches_gradients == [detached]
    assert turned in reader.reshapes_in_place
    assert written not in reader.reshapes_in_place
    assert reader.data_writes == [written]


def test_a_second_reader_decomposes_nothing_again():
    gm, known = sketched(lambda x, w: F.gelu(x @ w), torch.randn(T, D), torch.randn(D, FF)), {}
    first = Reader(gm, known)
    before = dict(known)
    second = Reader(gm, known)
    assert before
    assert known == before
    assert all(first.decomposed(node) is second.decomposed(node) for node in gm.graph.nodes)
