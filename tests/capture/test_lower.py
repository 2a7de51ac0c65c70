"""Captured nodes become an aten graph of the same computation: its ops, casts, gradients, writes and sizes."""

from __future__ import annotations

import operator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from graphs import captured, sketched
from torch import nn
from torch.fx import Graph, GraphModule

from mst_fx.capture.lower import apart, execute, lower, on_fakes, trace, traced, tracing
from mst_fx.core.modes import modes_of
from mst_fx.core.provenance import source_line
from mst_fx.core.sizes import fix, is_symbolic, sure, without_guards
from mst_fx.core.torch_private.tracing import FakeTensorMode
from mst_fx.core.values import fake_value

aten = torch.ops.aten
NOT_COMPUTED = ("output", torch._C._set_grad_enabled, torch.amp._enter_autocast, torch.amp._exit_autocast)


def lowered(fn, *inputs, **options):
    """All calls of a captured graph, lowered."""
    return lowered_graph(captured(fn, *inputs), **options)


def lowered_graph(gm, **options):
    live_ins = gm.graph.find_nodes(op="placeholder")
    nodes = [node for node in gm.graph.nodes if node.op != "placeholder" and node.target not in NOT_COMPUTED]
    (outputs,) = gm.graph.output_node().args
    made = lower(gm, nodes, live_ins, outputs, modes_of(gm.graph), **options)
    made.recompile()
    return made


def ops(gm):
    return [node.target for node in gm.graph.nodes if node.op == "call_function"]


def values(*shapes, dtype=torch.float64):
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def assert_same(gm, fn, inputs):
    """Values and gradients; where a value has no gradient, so has ours."""
    ours, theirs = gm(*inputs), fn(*inputs)
    for own, eager in zip(ours, theirs, strict=True):
        torch.testing.assert_close(own, eager)
        assert own.requires_grad == eager.requires_grad
    leaves = [x for x in inputs if x.requires_grad]
    grads = [
        torch.autograd.grad([y.sum() for y in made if y.requires_grad], leaves, allow_unused=True)
        for made in (ours, theirs)
    ]
    torch.testing.assert_close(*grads, msg=lambda text: f"gradients: {text}")


def mlp(x, up, down):
    return (F.linear(F.gelu(F.linear(x, up)), down),)


def test_ops_are_those_of_aten_and_their_values_are_kept():
    inputs = values((2, 3, 4), (8, 4), (4, 8))
    gm = lowered_graph(sketched(mlp, *inputs))
    assert [op.__name__ for op in ops(gm)] == [
        *("t.default", "view.default", "mm.default", "_unsafe_view.default", "gelu.default"),
        *("t.default", "view.default", "mm.default", "_unsafe_view.default"),
    ]
    shapes = [tuple(node.meta["val"].shape) for node in gm.graph.nodes if node.op != "output"]
    assert shapes[:3] + shapes[-1:] == [(2, 3, 4), (8, 4), (4, 8), (2, 3, 4)]
    assert_same(gm, mlp, inputs)


def test_each_op_has_the_line_of_its_node():
    here = Path(__file__)

    def two_lines(x, w):
        y = F.linear(x, w)
        return (y.softmax(-1),)

    gm = lowered(two_lines, *values((2, 3, 4), (8, 4)))
    lines = {source_line(node).split(": ", 1)[1] for node in gm.graph.nodes if node.op == "call_function"}
    assert lines == {"y = F.linear(x, w)", "return (y.softmax(-1),)"}
    assert all(source_line(node).startswith(f"{here}:") for node in gm.graph.nodes if node.op == "call_function")


def test_casts_of_autocast_are_nodes_and_each_use_has_its_own():
    def in_half(x, w):
        with torch.autocast("cpu", torch.bfloat16):
            y = x @ w
            with torch.autocast("cpu", enabled=False):
                z = x @ w
            return y, x @ w, z

    inputs = values((3, 4), (4, 5), dtype=torch.float32)
    gm = captured(in_half, *inputs)
    with torch.autocast("cpu", torch.bfloat16):
        gm = lowered_graph(gm)
    assert ops(gm) == [*[aten._to_copy.default] * 2, aten.mm.default, aten.mm.default, *ops(gm)[4:]]
    assert ops(gm)[4:] == [*[aten._to_copy.default] * 2, aten.mm.default]
    assert [y.dtype for y in gm(*inputs)] == [torch.bfloat16, torch.bfloat16, torch.float32]


def test_a_second_trace_casts_nothing():
    """Writes cost a second trace; the autocast around the program belongs to the first one alone."""

    def in_single(x, w):
        with torch.autocast("cpu", enabled=False):
            return ((x @ w).add_(1),)

    with torch.autocast("cpu", torch.bfloat16):
        inputs = values((3, 4), (4, 5), dtype=torch.float32)
        assert ops(lowered(in_single, *inputs)) == [aten.mm.default, aten.add.Tensor]


def teacher(x, w):
    y = x @ w
    with torch.no_grad():
        target = y.exp() * w.sum()
    return y * target, target


def written_without_gradients(x, w):
    y = x @ w
    with torch.no_grad():
        same = y.clamp_(-1, 1)
    return (same * y,)


@pytest.mark.parametrize("program", [teacher, written_without_gradients], ids=lambda program: program.__name__)
def test_blocks_without_gradients(program):
    inputs = values((3, 4), (4, 5))
    assert_same(lowered(program, *inputs), program, inputs)


def test_a_graph_without_gradients_has_no_detach():
    def all_of_it(x, w):
        with torch.no_grad():
            return ((x @ w).exp(),)

    assert ops(lowered(all_of_it, *values((3, 4), (4, 5)))) == [aten.mm.default, aten.exp.default]


def in_place(x, w):
    y = x @ w
    y.mul_(2).add_(w.sum())
    y[:, 0] = 7.0
    y[1] += y[0]
    return (y.tanh(),)


def test_writes_to_own_values_are_made_out_of_place():
    inputs = values((3, 4), (4, 5))
    gm = lowered(in_place, *inputs)
    assert not [op for op in ops(gm) if op._schema.is_mutable]
    assert_same(gm, in_place, inputs)


def test_what_no_result_needs_is_dropped():
    def unread(x, labels, w):
        (x * 2).exp()
        torch._assert_async((labels >= 0).all())
        return (F.one_hot(labels, 5).double() @ w.t() + x,)

    x, w = values((3, 4), (4, 5))
    inputs = [x, torch.tensor([0, 4, 2]), w]
    gm = lowered(unread, *inputs)
    assert not {aten.exp.default, aten._assert_async.default, aten._assert_async.msg, aten.all.default} & {*ops(gm)}
    assert_same(gm, unread, inputs)


def test_gathers_are_opened_unless_the_caller_reads_them():
    def entries(x, labels):
        return (x.gather(-1, labels[:, None]),)

    inputs = [*values((3, 5)), torch.tensor([0, 4, 2])]
    opened, kept = (lowered_graph(sketched(entries, *inputs), gathers=gathers) for gathers in (True, False))
    assert [aten.gather.default in ops(gm) for gm in (opened, kept)] == [False, True]
    assert_same(opened, entries, inputs)


def scores_of_labels(x, w, labels):
    """Nobody compares the lengths of tokens and labels: a gather takes fewer rows than there are."""
    scores = F.linear(x, w).gather(-1, labels[..., None])
    return (scores.view(x.shape[0] * labels.shape[1], 1),)


@pytest.fixture
def varying():
    """A captured graph, and the sizes that vary in it: batch and length of the tokens."""
    x, w, labels = *values((2, 6, 4), (5, 4)), torch.zeros(2, 6, dtype=torch.int64)
    for marked, dim in ((x, 0), (x, 1), (labels, 0), (labels, 1)):
        torch._dynamo.mark_dynamic(marked, dim)
    gm = captured(scores_of_labels, x, w, labels)
    (stream,) = (node for node in gm.graph.nodes if node.name == "l_x_")
    return gm, fake_value(stream).shape[:2]


def test_sizes_that_vary_stay_symbols_and_add_no_guard(varying):
    gm, sizes = varying
    with without_guards(sizes):
        shape = lowered_graph(gm).graph.output_node().args[0][0].meta["val"].shape
    assert [is_symbolic(size) for size in shape] == [True, False]


def test_sizes_that_are_known_by_now_are_numbers(varying):
    gm, (batch, _) = varying
    fix(batch)
    made = lowered_graph(gm).graph
    products = made.find_nodes(op="call_function", target=operator.mul)  # batch times length
    assert products
    assert {product.args[0] for product in products} == {2}
    (product,) = made.find_nodes(op="call_function", target=aten.mm.default)
    (scores,) = product.users
    assert (type(scores.meta["val"].shape[0]), scores.args[1][0]) == (int, 2)


def test_tensors_that_are_there_twice_are_told_apart():
    x = torch.ones(2, requires_grad=True)
    first, (again, number), other = apart([x, [x, 3], torch.ones(2)])
    assert first is x
    assert again is not x
    assert again.requires_grad
    assert (number, other.requires_grad) == (3, False)
    assert again.data_ptr() == x.data_ptr()


def test_a_trace_has_a_placeholder_for_each_leaf():
    with torch._subclasses.FakeTensorMode():
        x, y = torch.ones(2), torch.ones(3)
    with tracing([x, y]):
        assert not torch.is_grad_enabled()
        gm = traced(lambda pair, z: [pair[1].exp() + z], [[x, y], y])
    assert [node.op for node in gm.graph.nodes] == ["placeholder"] * 3 + ["call_function"] * 2 + ["output"]


@pytest.mark.parametrize("length", [6, None])
def test_a_function_traced_on_fakes_of_its_own(length):
    def slope(x, w):
        y = (x @ w).view(-1)
        return torch.autograd.grad(y.square().sum(), w)

    def make(length):
        return torch.empty(length, 4), torch.empty(4, 5, requires_grad=True)

    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        gm = trace(slope, make, length)
    assert aten.reshape.default in ops(gm)
    assert not {aten.view.default, aten._to_copy.default} & {*ops(gm)}
    gm.recompile()
    for rows in (6, *([1, 2, 9] if length is None else [])):
        x, w = values((rows, 4), (4, 5), dtype=torch.float32)
        torch.testing.assert_close(gm(x, w)[0], torch.autograd.grad((x @ w).square().sum(), w)[0])


def test_on_fakes_of_any_length_a_function_knows_one_fact():
    def facts(x):
        return [sure(x.shape[0] >= 2), sure(x.shape[0] >= 3), x.requires_grad]

    assert on_fakes(facts, lambda length: [torch.empty(length, requires_grad=True)], None) == [True, False, True]
    assert on_fakes(lambda x: x.shape[0], lambda length: [torch.empty(length)], 7) == 7


def test_with_symbols_torch_does_not_cache_what_ops_give(varying):
    def hits(length):
        before = FakeTensorMode.cache_hits
        on_fakes(lambda x: [x + 1, x + 1], lambda length: [torch.empty(length)], length)
        return FakeTensorMode.cache_hits - before

    assert (hits(7) > 0, hits(None) > 0) == (True, False)
    gm, _ = varying
    (mode,) = {x.fake_mode for node in gm.graph.nodes if isinstance(x := fake_value(node), torch.Tensor)}
    lowered_graph(gm)
    assert mode.cache_enabled


def test_one_node_on_values():
    graph = Graph()
    x, w = graph.placeholder("x"), graph.placeholder("w")
    made = [
        graph.call_function(torch.add, (x, w), {"alpha": 3}),
        graph.call_method("sum", (x,), {"dim": 0}),
        graph.call_module("twice", (x,)),
    ]
    graph.output(made)
    double = nn.Linear(2, 2, bias=False)
    nn.init.constant_(double.weight, 2.0)
    owner = GraphModule({"twice": double}, graph)
    env = {x: torch.ones(1, 2), w: torch.full((1, 2), 5.0)}
    assert [execute(owner, node, env).tolist() for node in made] == [[[16.0, 16.0]], [1.0, 1.0], [[4.0, 4.0]]]
    with pytest.raises(ValueError, match="cannot run placeholder x"):
        execute(owner, x, env)


@pytest.mark.parametrize(
    ("index", "ops"),
    [
        ((..., [-2], slice(None)), {aten.slice.Tensor, aten.clone.default}),
        (([1, 2],), {aten.slice.Tensor, aten.clone.default}),
        ((slice(None), [-2, -1], None), {aten.slice.Tensor, aten.clone.default, aten.unsqueeze.default}),
        (([-1, 0],), None),
        (([2, 1],), None),
        ((0, slice(None), [1]), None),
        (([0], [1]), None),
        (([True, False, True],), None),
    ],
)
def test_a_list_of_positions_is_a_slice_where_they_follow_one_another(index, ops):
    """Its value has memory of its own in any case."""
    graph = Graph()
    x = graph.placeholder("x")
    node = graph.call_function(operator.getitem, (x, index))
    graph.output(node)
    owner, value = GraphModule({}, graph), torch.randn(3, 4, 5)
    made = execute(owner, node, {x: value})
    assert torch.equal(made, value[index])
    assert made.untyped_storage().data_ptr() != value.untyped_storage().data_ptr()
    traced_ops = {each.target for each in traced(lambda value: execute(owner, node, {x: value}), [value]).graph.nodes}
    assert (aten.index.Tensor in traced_ops) == (ops is None)
    assert ops is None or ops <= traced_ops


def test_collectives_that_no_output_needs_are_dropped():
    """Torch keeps them, with all that they read; a body whose loss nobody reads would make all ranks wait."""

    def run(x):
        summed = torch.ops._c10d_functional.all_reduce((x * 2).sum(-1), "sum", "0")
        torch.ops._c10d_functional.wait_tensor(summed)
        return (x + 1,)

    module = trace(run, lambda length: [torch.empty(length, 3)], 4)
    assert [node.target for node in module.graph.nodes if node.op == "call_function"] == [torch.ops.aten.add.Tensor]
