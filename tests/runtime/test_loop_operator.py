"""The loop operator: which body runs on which chunk, what a compiler sees of it, what checkpointing saves."""

from __future__ import annotations

import weakref
from functools import partial

import pytest
import torch
from symbols import varying
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy

from mst_fx.core.sizes import depends_on_data, sure
from mst_fx.runtime import loop_operator
from mst_fx.runtime.loop_operator import (
    LoopSpec,
    axis_length,
    chunk_examples,
    mini_sequence_loop,
    results_saved,
    run_loop,
)

F32, BF16 = torch.float32, torch.bfloat16
ROWS = (0, 1, 1)


def spec(chunk=4, ins=(ROWS, None), outs=(("cat", 0, 1, 1), ("sum", F32, F32)), strides=()):
    return tuple(LoopSpec("a version", chunk, ins, outs, strides))


def body(x, w):
    """Of a chunk of rows: their products, and the sum of these over the rows."""
    y = x.mm(w)
    return y, y.sum(0)


def on_a_list(function):
    return lambda operands: function(*operands)


def check(results, x, w):
    torch.testing.assert_close(list(results), [x @ w, (x @ w).sum(0)])


# run_loop


@pytest.mark.parametrize(("length", "full", "ragged"), [(8, 2, 0), (10, 2, 1), (4, 1, 0), (3, 0, 1)])
def test_full_chunks_run_one_body_and_the_ragged_one_another(length, full, ragged):
    ran = []

    def counted(name):
        return lambda operands: ran.append((name, len(operands[0]))) or body(*operands)

    x, w = torch.randn(length, 3), torch.randn(3, 2)
    results = run_loop((counted("full"), counted("tail") if ragged else None), spec(), [x, w])
    assert ran == [("full", 4)] * full + [("tail", length % 4)] * ragged
    check(results, x, w)


def test_the_axis_is_that_of_the_first_operand_that_is_split():
    operands = [torch.empty(5), torch.empty(3, 24), torch.empty(4, 7)]
    assert axis_length([None, (1, 2, 3), (0, 1, 1)], operands) == 4


def test_all_operands_are_split_along_factors_of_their_own():
    """An operand of 6 positions with 2 rows each, one with 3 groups of 6 positions, one that is whole."""
    x, y, w = torch.randn(12, 2), torch.randn(5, 18), torch.randn(7)
    seen = []

    def shapes(operands):
        seen.append([tuple(operand.shape) for operand in operands])
        return [operands[0].sum((1, 2))]

    (result,) = run_loop((shapes, shapes), spec(4, ((0, 1, 2), (1, 3, 1), None), (("cat", 0, 1, 1),)), [x, y, w])
    assert seen == [[(4, 2, 2), (5, 3, 4), (7,)], [(2, 2, 2), (5, 3, 2), (7,)]]
    torch.testing.assert_close(result, x.view(6, 4).sum(1))


def test_whole_operands_are_laid_out_once():
    seen = []
    w = torch.randn(2, 3).t()
    bodies = (lambda operands: seen.append(operands[1]) or body(*operands), None)
    for strides in ((), ((1, (1, 3)),)):
        seen.clear()
        run_loop(bodies, spec(strides=strides), [torch.randn(12, 3), w])
        assert len(set(map(id, seen))) == 1
        assert seen[0].stride() == ((1, 3) if strides else (2, 1))
        assert (seen[0] is w) == bool(strides)


def test_the_outputs_of_a_chunk_are_freed_before_the_next_one_starts():
    given: list[weakref.ref] = []

    def watched(operands):
        assert not [out for out in given if out() is not None]
        outs = body(*operands)
        given.extend(map(weakref.ref, outs))
        return outs

    run_loop((watched, None), spec(), [torch.randn(12, 3), torch.randn(3, 2)])
    assert len(given) == 6


def test_sums_are_cast_one_after_the_other(monkeypatch):
    """A sum in float32 is freed before the next one gets its copy in half precision."""
    sums: list[weakref.ref] = []
    make = loop_operator.collector_of

    class Watched:
        def __init__(self, *arguments):
            self.collector = make(*arguments)

        def add(self, outs):
            self.collector.add(outs)

        def finished(self):
            assert not [total for total in sums if total() is not None]
            sums.append(weakref.ref(self.collector._total))
            return self.collector.finished()

    monkeypatch.setattr(loop_operator, "collector_of", Watched)
    both = (lambda operands: [operands[0].sum(0), operands[0].sum(0)], None)
    run_loop(both, spec(2, (ROWS,), (("sum", F32, BF16),) * 2), [torch.ones(4, 3, dtype=BF16)])
    assert len(sums) == 2


# the operator


def test_it_runs_eagerly_and_has_no_derivative_of_its_own():
    x, w = torch.randn(10, 3), torch.randn(3, 2, requires_grad=True)
    results = mini_sequence_loop(body, body, spec(), x, w)
    check(results, x, w)
    assert not any(result.requires_grad for result in results)


def test_fake_results_are_shaped_as_real_ones():
    sums = (("sum", F32, BF16), ("outer", F32, BF16), ("grouped", F32, BF16))
    kinds = (("cat", 0, 1, 1), *sums, ("rows", 1, ROWS, (0, 2)))

    def of_every_kind(x, w):
        y = x @ w
        ends = torch.full((4,), 2, dtype=torch.int32)
        return y.double(), y.sum(0), x, y, x, y, ends, x, w

    real = [torch.randn(10, 3), torch.randn(3, 2)]
    expected = mini_sequence_loop(of_every_kind, of_every_kind, spec(outs=kinds), *real)
    with FakeTensorMode() as mode:
        fakes = mini_sequence_loop(of_every_kind, of_every_kind, spec(outs=kinds), *map(mode.from_tensor, real))
    assert [(x.shape, x.dtype, x.stride()) for x in fakes] == [(x.shape, x.dtype, x.stride()) for x in expected]
    assert [x.dtype for x in fakes] == [torch.float64, BF16, BF16, BF16, F32]


def test_a_body_is_asked_once_for_operands_that_are_alike():
    asked = []

    def counted(x, w):
        asked.append(x.shape)
        return body(x, w)

    with FakeTensorMode():
        w = torch.empty(3, 2)
        for length in (12, 12, 20):  # the chunks are alike
            mini_sequence_loop(counted, None, spec(), torch.empty(length, 3), w)
        assert len(asked) == 1
        mini_sequence_loop(counted, None, spec(), torch.empty(12, 3, dtype=BF16), w.bfloat16())
        assert len(asked) == 2


def test_a_trace_holds_one_node_and_bodies_of_its_own():
    def viewed(x, w):
        y = (x @ w).view(-1)
        return y.reshape(-1, 2), y.view(-1, 2).sum(0)

    full, tail = (make_fx(viewed)(torch.randn(rows, 3), torch.randn(3, 2)) for rows in (4, 2))

    def two_loops(x, w):
        once, _ = mini_sequence_loop(full, tail, spec(), x, w)
        return mini_sequence_loop(full, tail, spec(), x, w + once.sum())

    gm = make_fx(two_loops, tracing_mode="fake")(torch.randn(10, 3), torch.randn(3, 2))
    loops = gm.graph.find_nodes(op="call_function", target=mini_sequence_loop)
    assert [loop.args[2] for loop in loops] == [spec()] * 2
    first, second = ([getattr(gm, body.target) for body in loop.args[:2]] for loop in loops)
    assert first == second  # traced once
    for own in first:
        assert not own.graph.find_nodes(op="call_function", target=torch.ops.aten.view.default)
    x, w = torch.randn(10, 3), torch.randn(3, 2)
    check(gm(x, w), x, w + (x @ w).sum())


def test_functionalization_goes_through():
    x, w = torch.randn(10, 3), torch.randn(3, 2)
    check(torch.func.functionalize(lambda x, w: mini_sequence_loop(body, body, spec(), x, w))(x, w), x, w)


class Watching(TorchDispatchMode):
    def __init__(self, supported):
        super().__init__()
        self.supports_higher_order_operators, self.seen = supported, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


def test_a_mode_that_knows_no_such_operator_sees_the_ops_of_the_bodies():
    x, w = torch.randn(10, 3), torch.randn(3, 2)
    with Watching(False) as mode:
        results = mini_sequence_loop(body, body, spec(), x, w)
    check(results, x, w)
    assert mode.seen.count(torch.ops.aten.mm.default) == 3
    assert mini_sequence_loop not in mode.seen


# what compilers ask


def test_examples_are_shaped_and_laid_out_as_the_loop_gives_operands():
    x, y, w = torch.randn(10, 3).t(), torch.randn(3, 20), torch.randn(2, 3).t()
    loop = spec(4, ((1, 1, 1), (1, 2, 1), None), (("cat", 0, 1, 1),), ((2, (1, 3)),))
    seen = []

    def watched(operands):
        seen.append([(operand.shape, operand.stride()) for operand in operands])
        return [operands[0].sum(0)]

    run_loop((watched, watched), loop, [x, y, w])
    with FakeTensorMode() as mode:
        examples = chunk_examples(loop, [mode.from_tensor(operand) for operand in (x, y, w)], None)
    assert [[(operand.shape, operand.stride()) for operand in chunk] for chunk in examples] == [seen[0], seen[-1]]


def test_a_length_that_varies_gives_a_ragged_chunk_of_any_length():
    shape_env = ShapeEnv()
    with FakeTensorMode(shape_env=shape_env):
        total, columns = varying(shape_env, 10), varying(shape_env, 2)
        x, w = torch.empty(total, 3), torch.empty(3, columns)
        full, tail = chunk_examples(spec(), [x, w], shape_env)
        result, total_sum = mini_sequence_loop(body, body, spec(), x, w)
    assert list(full[0].shape) == [4, 3]
    assert depends_on_data(tail[0].shape[0])
    assert [sure(tail[0].shape[0] >= least) for least in (2, 3)] == [True, False]
    assert all(map(sure, [result.shape[0] == total, result.shape[1] == columns, total_sum.shape[0] == columns]))
    assert not shape_env.guards


@pytest.mark.parametrize("policy", [CheckpointPolicy.PREFER_RECOMPUTE, CheckpointPolicy.MUST_RECOMPUTE])
def test_checkpointing_saves_the_results_that_it_would_rather_compute_again(policy):
    full = make_fx(body)(torch.randn(4, 3), torch.randn(3, 2))
    with results_saved():
        gm = make_fx(partial(mini_sequence_loop, full, None, spec()), tracing_mode="fake")(
            torch.ones(8, 3), torch.ones(3, 2)
        )
        for node in gm.graph.nodes:
            node.meta["recompute"] = policy
    (loop,) = gm.graph.find_nodes(op="call_function", target=mini_sequence_loop)
    saved = {node for node in gm.graph.nodes if node.meta["recompute"] is CheckpointPolicy.MUST_SAVE}
    assert saved == ({loop, *loop.users} if policy is CheckpointPolicy.PREFER_RECOMPUTE else set())
