"""A node of an aten graph runs on fewer positions of the axis than it was traced for."""

from __future__ import annotations

import pytest
import torch
from looping import Call, aten_graph, indices, placeholders, values
from symbols import varying
from torch._subclasses import FakeTensorMode
from torch.fx import Graph
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from mst_fx.placement.placement import WHOLE, Routed, Split
from mst_fx.placement.run_on_chunk import numbers_read, run_resized
from mst_fx.verify.by_chunks import Program

aten = torch.ops.aten
X = values(6, 4)


def resized(op, *args, split, length, chunk, **kwargs):
    """One op on X and on other arguments, in a program of 6 positions; `chunk` takes the place of X."""
    program = Program()
    node = program.call(op, program.input(X), *args, **kwargs)
    return run_resized(node, split, length, {program.inputs[0]: chunk})


@pytest.mark.parametrize("length", [4, 1])
@pytest.mark.parametrize(
    ("op", "args", "split", "whole"),
    [
        (aten.view.default, [[6, 2, 2]], Split(0), lambda x: x.view(-1, 2, 2)),
        (aten.view.default, [[24]], Split(0, inner=4), lambda x: x.view(-1)),
        (aten.expand.default, [[5, 6, 4]], Split(1), lambda x: x.expand(5, -1, 4)),
        (aten.slice.Tensor, [0, 0, 6], Split(0), lambda x: x),
        (aten.slice.Tensor, [1, 1, 3], Split(0), lambda x: x[:, 1:3]),
        (aten.new_full.default, [[6, 2], 3.0], Split(0), lambda x: x.new_full((len(x), 2), 3.0)),
        (aten.new_full.default, [[6, 2], 3.0], WHOLE, lambda x: x.new_full((6, 2), 3.0)),
        (aten.sum.dim_IntList, [[0]], WHOLE, lambda x: x.sum(0)),
        (aten.cumsum.default, [1], Split(0), lambda x: x.cumsum(1)),
    ],
)
def test_sizes_of_split_values_are_those_of_the_chunk(op, args, split, whole, length):
    chunk = values(length, 4, seed=1)
    made = resized(op, *args, split=split, length=length, chunk=chunk)
    torch.testing.assert_close(made, whole(chunk))


def test_a_view_of_factors_around_the_axis():
    """Two rows of 3 positions, of 2 features: a chunk of one position has one of each row."""
    chunk = values(2, 4)
    assert resized(aten.view.default, [6, 4], split=Split(0, outer=2), length=1, chunk=chunk).shape == (2, 4)
    made = resized(aten.view.default, [2, 3, 2, 2], split=Split(1), length=1, chunk=chunk)
    assert torch.equal(made, chunk.view(2, 1, 2, 2))


def test_fills_by_keyword():
    program = Program()
    node = program.call(aten.full.default, size=[6, 4], fill_value=2.0)
    made = run_resized(node, Split(0, outer=2), 2, {})
    assert torch.equal(made, torch.full((4, 4), 2.0))


def test_a_group_norm_takes_its_images_from_the_chunk():
    program = Program()
    images = program.input(values(6, 4, 3))
    node = program.call(aten.native_group_norm.default, images, None, None, 6, 4, 3, 2, 1e-5)
    chunk = values(2, 4, 3, seed=1)
    made = run_resized(node, (Split(0), Split(0), Split(0)), 2, {images: chunk})
    torch.testing.assert_close(made[0], torch.nn.functional.group_norm(chunk, 2))
    assert made[1].shape == (2, 2)


def picked(x, labels):
    return x[torch.arange(x.shape[0]), labels]


def test_rows_are_counted_anew():
    labels = indices(6, below=4)
    module = aten_graph(Call(picked, [X, labels]))
    x, given = placeholders(module)
    (node,) = module.graph.find_nodes(op="call_function", target=aten.index.Tensor)
    made = run_resized(node, Split(0), 2, {x: X[4:], given: labels[4:]})
    assert torch.equal(made, picked(X[4:], labels[4:]))


def test_a_permutation_is_inverted_in_its_own_length():
    """Its operands are whole: neither the memory that is written to nor the positions exist in a chunk."""

    def inverse(order):
        return aten.index_put.default(torch.empty_like(order), [order], torch.arange(order.shape[0]))

    module = aten_graph(Call(inverse, [torch.tensor([2, 0, 3, 1])]))
    (order,) = placeholders(module)
    (node,) = module.graph.find_nodes(op="call_function", target=aten.index_put.default)
    routed = Routed("inverse", order, Split(0))
    assert run_resized(node, routed, 3, {order: torch.tensor([2, 0, 1])}).tolist() == [1, 2, 0]


@pytest.fixture
def graph():
    """An aten graph with an input of a length that varies, with this length, and with another number."""
    made, shape_env = Graph(), ShapeEnv()
    x, length, number = (made.placeholder(name) for name in ("x", "length", "number"))
    length.meta["val"], number.meta["val"] = varying(shape_env, 6), varying(shape_env, 3)
    with FakeTensorMode(shape_env=shape_env):
        x.meta["val"] = torch.empty(length.meta["val"], 4)
    return made


@pytest.mark.parametrize(
    ("op", "args", "of_the_chunk", "left"),
    [
        (aten.view.default, ["x", ["length", "number", 4]], Split(0), []),
        (aten.view.default, ["x", ["length", "number", 4]], WHOLE, ["length", "number"]),
        (aten.expand.default, ["x", ["length", 4]], Split(0), []),
        (aten.full.default, [["length", 4], "number"], Split(0), ["number"]),
        (aten.full.default, [["length", 4], "number"], WHOLE, ["length", "number"]),
        (aten.slice.Tensor, ["x", 0, 0, "length"], Split(0), []),
        (aten.slice.Tensor, ["x", 1, 0, "number"], Split(0), ["number"]),
        (aten.mul.Tensor, ["x", "number"], Split(0), ["number"]),
        (aten.native_group_norm.default, ["x", None, None, "length", 4, "number", 2, 1e-5], Split(0), ["number"]),
    ],
)
def test_numbers_that_a_node_needs(graph, op, args, of_the_chunk, left):
    """All but the sizes of a split value, which come from the chunk."""
    known = {node.name: node for node in graph.nodes}

    def with_nodes(arg):
        return [with_nodes(one) for one in arg] if isinstance(arg, list) else known.get(arg, arg)

    node = graph.call_function(op, tuple(with_nodes(args)))
    node.meta["val"] = known["x"].meta["val"]
    assert [number.name for number in numbers_read(node, of_the_chunk)] == left
