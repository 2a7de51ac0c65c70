"""What comes into a region with its nodes: nodes in between, writes, new memory, and the permutations of its rows."""

from __future__ import annotations

import pytest
import torch
from graphs import sketched
from looping import returned

from mst_fx.recognise.reader import Reader
from mst_fx.recognise.sorted_rows import is_picked_by_top_k, required_by, with_permutations

T, D = 6, 8


def graph_of(fn, *shapes):
    gm = sketched(fn, *(torch.randn(shape, requires_grad=True) for shape in shapes or [(T, D)]))
    return Reader(gm), [node for node in gm.graph.nodes if node.op.startswith("call")]


def test_what_lies_in_between_comes_in():
    def program(x):
        first = x.exp()
        return first * (first.sum(-1, keepdim=True) * 2), x.sin()

    reader, (exp, total, double, product, _) = graph_of(program)
    assert set(required_by(reader, {exp, product})) == {double}
    assert set(required_by(reader, {exp, double, product})) == {total}
    assert required_by(reader, {exp, total, double, product}) == []


@pytest.mark.parametrize(
    ("program", "comes_in"),
    [
        (lambda y: (y.mul_(2), y.sin()), True),  # the region reads what was written
        (lambda y: (y.sin(), y.mul_(2)), False),  # after all reads: a write to the loop's result
        (lambda y: (y.t().mul_(2), y.sin()), True),
        (lambda y: ((y + 0).mul_(2), y.sin()), False),
    ],
)
def test_a_write_comes_in_where_the_region_reads_what_it_has_written(program, comes_in):
    reader, calls = graph_of(lambda x: program(x.exp()))
    (write,) = (node for node in calls if node.target == "mul_")
    inside = {node for node in calls if node is not write}
    assert (write in required_by(reader, inside)) == comes_in


def test_new_memory_comes_in_with_the_write_to_it():
    def program(x):
        room, other = torch.zeros_like(x), x.new_ones(3)
        return room.add_(x.exp()) * other.sum()

    reader, calls = graph_of(program)
    room, other, exp, write, total, product = calls
    assert required_by(reader, {exp, write}) == [room]
    assert required_by(reader, {exp, write, total, product, room}) == [other]  # nobody else reads it


def sorted_rows(x, experts):
    order = (experts + 1).reshape(-1).sort()[1]
    rows = x[order // 2]
    wide = rows.exp()
    back = wide[order.argsort()]
    return back.view(T, 2, D).sum(1)


def added_by_index(x, experts):
    order = (experts + 1).view(-1).argsort()
    tokens = order // 2
    wide = x[tokens].exp()
    return torch.zeros_like(x).index_add(0, tokens, wide).sin()


@pytest.mark.parametrize(
    ("program", "inside", "outside"),
    [
        (sorted_rows, ["reshape", "sort", "floordiv", "argsort", "exp"], ["add", "view", "sum"]),
        (added_by_index, ["view", "argsort", "floordiv", "exp", "index_add"], ["add", "sin"]),
    ],
)
def test_sorts_come_in_with_the_rows_that_they_permute_and_what_brings_these_back(program, inside, outside):
    """The keys stay outside, and what reads rows in the order of the program."""
    gm = sketched(program, torch.randn(T, D), torch.randint(0, 3, (T, 2)))
    (wide,) = gm.graph.find_nodes(op="call_method", target="exp")
    (rows,) = wide.all_input_nodes
    found = with_permutations(Reader(gm), frozenset([rows, wide]), rows.all_input_nodes[0])
    names = {getattr(node.target, "__name__", node.target) for node in found}
    assert set(inside) <= names
    assert names.isdisjoint(outside)


def test_nodes_without_a_sort_in_front_are_left_as_they_are():
    reader, (exp, sin, order) = graph_of(lambda x: (x.exp().sin(), x.argsort()))
    (x,) = exp.all_input_nodes
    assert with_permutations(reader, frozenset([exp, sin]), x) == {exp, sin}
    assert order not in with_permutations(reader, frozenset([exp]), x)


@pytest.mark.parametrize(
    ("pick", "is_picked"),
    [
        (lambda x: x.topk(2)[1], True),
        (lambda x: torch.topk(x, 2, -1)[1], True),
        (lambda x: torch.topk(x, 2, dim=1)[1], True),
        (lambda x: torch.topk(x, 2, dim=0)[1], False),
        (lambda x: x.topk(2)[0], False),
        (lambda x: x.sort()[1], False),
        (lambda x: x.argmax(-1), False),
    ],
)
def test_indices_of_a_top_k(pick, is_picked):
    gm = sketched(lambda x: pick(x), torch.randn(T, D))
    assert is_picked_by_top_k(returned(gm)[0]) == is_picked
