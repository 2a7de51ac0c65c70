"""Single nodes become aten ops, each by itself; what a node wrote to is told, and what cannot be traced."""

from __future__ import annotations

import operator

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from torch._subclasses import FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils._pytree import tree_map, tree_map_only

from mst_fx.capture.decomposed import decompose_alone, decompose_together

aten = torch.ops.aten


class Captured:
    """A captured graph, built call by call."""

    def __init__(self):
        self.owner, self.mode = GraphModule({}, Graph()), FakeTensorMode()

    def input(self, *shape, of=torch.empty):
        node = self.owner.graph.placeholder("x")
        with self.mode:
            node.meta["example_value"] = of(shape)
        return node

    def call(self, function, *args, made=None):
        """A call; it runs on copies, as Dynamo keeps the values from before a write."""
        node = self.owner.graph.call_function(function, args)
        with self.mode:
            values = tree_map_only(Node, lambda operand: tree_map(_copied, operand.meta["example_value"]), args)
            node.meta["example_value"] = function(*values) if made is None else made
        return node


def _copied(value):
    return value.clone() if isinstance(value, torch.Tensor) else value


@pytest.fixture
def program():
    return Captured()


def ops(decomposed):
    return [op.target for op in decomposed.ops if op.op == "call_function"]


def operands(decomposed, op):
    """The positions of the placeholders that an op reads."""
    return [decomposed.position_of.get(operand) for operand in op.all_input_nodes]


def test_none_is_traced_on_what_another_one_gives(program):
    x, w = program.input(2, 3, 4), program.input(5, 4)
    wide = program.call(F.linear, x, w)
    made = program.call(torch.relu, wide)
    again = program.call(torch.add, made, wide)
    found = decompose_together(program.owner, [wide, made, again])
    assert [ops(found[node]) for node in (made, again)] == [[aten.relu.default], [aten.add.Tensor]]
    assert aten.mm.default in ops(found[wide])
    assert all(one.understood and not one.written for one in found.values())


def test_operands_are_told_by_their_position(program):
    x, y = program.input(3), program.input(3)
    backwards = program.call(lambda a, b: b - a.exp(), y, x)
    squared = program.call(torch.mul, x, x)
    found = decompose_together(program.owner, [backwards, squared])
    exp, sub = found[backwards].ops
    assert (operands(found[backwards], exp), operands(found[backwards], sub)) == ([0], [1, None])
    (mul,) = found[squared].ops
    assert operands(found[squared], mul) == [0]


def test_all_tensors_of_an_operand_have_its_position(program):
    x, y = program.input(4, 3), program.input(3)
    parts = program.call(torch.chunk, x, 2)
    joined = program.call(lambda parts, y: torch.cat([y[None], *parts]), parts, y)
    for found in (decompose_together(program.owner, [joined])[joined], decompose_alone(program.owner, joined, joined)):
        assert sorted(found.position_of.values()) == [0, 0, 1]
        assert operands(found, found.ops[-1])[1:] == [0, 0]


def test_several_results_have_the_ops_of_all(program):
    x = program.input(3, 4)
    both = program.call(lambda x: (x.exp(), [x.sin(), 3]), x)
    after = program.call(torch.neg, x)
    found = decompose_together(program.owner, [both, after])
    assert [ops(found[node]) for node in (both, after)] == [[aten.exp.default, aten.sin.default], [aten.neg.default]]


def test_gathers_stay_gathers(program):
    x, index = program.input(3, 4), program.input(3, 1, of=lambda shape: torch.zeros(shape, dtype=torch.int64))
    picked = program.call(torch.gather, x, 1, index)
    assert ops(decompose_together(program.owner, [picked])[picked]) == [aten.gather.default]
    assert ops(decompose_alone(program.owner, picked, picked)) == [aten.gather.default]


def fails(x):
    raise RuntimeError("not on fake tensors")


def test_what_cannot_be_traced_costs_no_other_node(program):
    x = program.input(3)
    first, broken, last = program.call(torch.exp, x), program.call(fails, x, made=7), program.call(torch.sin, x)
    found = decompose_together(program.owner, [first, broken, last])
    assert [ops(found[node]) for node in (first, last)] == [[aten.exp.default], [aten.sin.default]]
    assert found[broken].ops == ()
    assert (found[broken].understood, found[broken].written) == (False, {0})  # it may have written to all
    assert decompose_alone(program.owner, broken, broken) is None


def test_an_op_of_torch_that_cannot_be_traced_has_not_written(program):
    x = program.input(3)
    with program.mode:
        made = torch.empty(3)
    product = program.call(torch.mm, x, x, made=made)
    number = program.call(operator.add, 3, 4)
    assert decompose_together(program.owner, [product, number]) == {product: None, number: None}


def writes_to_the_second(x, y):
    y.add_(1)
    return x * 2


def through_data(x, y):
    y.data.add_(1)  # changes no version
    return x * 2


def raises_late(x, y):
    y.add_(1)
    raise RuntimeError


@pytest.mark.parametrize("function", [writes_to_the_second, through_data, raises_late], ids=lambda f: f.__name__)
def test_a_function_of_the_user_that_writes_may_write_to_all(program, function):
    x, y, z = program.input(3), program.input(3), program.input(3)
    node, other = program.call(function, x, y, made=x.meta["example_value"]), program.call(torch.exp, z)
    found = decompose_together(program.owner, [node, other])
    assert found[node].written == {0, 1}
    assert (ops(found[other]), found[other].written) == ([aten.exp.default], set())


def test_an_op_of_torch_writes_to_what_has_another_version(program):
    x, y = program.input(3), program.input(3)
    node = program.call(torch.ops.aten.add_.Tensor, x, y)
    node.op, node.target = "call_method", "add_"
    assert decompose_together(program.owner, [node])[node].written == {0}


def filled(x):
    y = torch.zeros_like(x)
    y.add_(x)
    return y


def test_writes_to_memory_of_its_own_are_made_out_of_place(program):
    x = program.input(3)
    node, other = program.call(filled, x), program.call(torch.exp, x)
    found = decompose_together(program.owner, [node, other])
    assert aten.add.Tensor in ops(found[node])
    assert not [op for op in ops(found[node]) if op._schema.is_mutable]
    assert found[node].understood
    assert list(found[node].position_of.values()) == [0]
    assert ops(found[other]) == [aten.exp.default]


def test_a_node_that_writes_to_its_operand(program):
    x = program.input(3)
    added = program.call(torch.Tensor.add_, x, 1)
    assert ops(decompose_alone(program.owner, added, added)) == [aten.add.Tensor]
    filled_in = program.call(operator.setitem, x, 0, 5.0)
    found = decompose_alone(program.owner, filled_in, x)
    assert found.understood
    assert not [op for op in ops(found) if op._schema.is_mutable]


def varying(*sizes):
    """A graph whose input has a length that is only known at run time, captured as 5."""
    program = Captured()
    environment = ShapeEnv()
    program.mode = FakeTensorMode(shape_env=environment)
    node = program.owner.graph.placeholder("x")
    like = torch.empty(*sizes)
    node.meta["example_value"] = program.mode.from_tensor(
        like, symbolic_context=StatelessSymbolicContext([DimDynamic.DYNAMIC, *[DimDynamic.STATIC] * (len(sizes) - 1)])
    )
    return program, node


def is_on_sizes(decomposed):
    shapes = [getattr(op.meta["val"], "shape", ()) for op in decomposed.ops]
    return any(isinstance(size, torch.SymInt) for shape in shapes for size in shape)


def test_nodes_are_decomposed_on_numbers_but_where_sizes_are_asked_for():
    program, x = varying(5, 3, 4)
    w, each = program.input(6, 4), program.input(4, 4)
    made = x.meta["example_value"]  # what a node gives is not asked for
    linear = program.call(F.linear, x, w, made=made)
    scores = program.call(lambda x: x @ x.transpose(1, 2), x, made=made)
    twice = program.call(lambda x, each: x @ each @ each, x, each, made=made)
    found = decompose_together(program.owner, [linear, scores, twice])
    assert [is_on_sizes(found[node]) for node in (linear, scores, twice)] == [False, True, True]
    assert aten.mm.default in ops(found[linear])
