"""The bodies and literals of one call: full and ragged chunks, forward and backward."""

from __future__ import annotations

import functools
from copy import copy
from dataclasses import replace

import pytest
import torch
from graphs import captured, region_of, sketched

import mst_fx
from mst_fx.bodies import body, stand_in
from mst_fx.bodies.call import assembled
from mst_fx.bodies.work import analysed
from mst_fx.capture.lower import trace
from mst_fx.runtime.cache_version import VERSION
from mst_fx.runtime.loop_operator import LoopSpec
from mst_fx.runtime.result_kinds import Outer, Sum

T, D, V = 6, 4, 8


def head(x, w):
    return (x @ w).logsumexp(-1)


def loss(x, w):
    return head(x, w).sum()


@functools.cache
def work_of(fn, dtype=torch.float32, needs=True, dynamic=False, **options):
    x, w = (torch.randn(shape, dtype=dtype, requires_grad=needs) for shape in ((T, D), (D, V)))
    if dynamic:
        torch._dynamo.mark_dynamic(x, 0)
    gm = (captured if dynamic else sketched)(fn, x, w)
    return analysed(region_of(gm, options.pop("returned", 0)), mst_fx.Config(**options), {})


def there(call):
    """Which of the bodies there are."""
    return [body is not None for body in call.bodies]


@pytest.mark.parametrize(
    ("fn", "needs", "chunk", "bodies"),
    [
        (head, True, 3, [True, False, True, False]),
        (head, True, 4, [True, True, True, True]),
        (head, False, 4, [True, True, False, False]),
        (loss, True, 4, [False, False, True, True]),  # one loop makes result and gradients
        (loss, True, 3, [False, False, True, False]),
    ],
)
def test_bodies_of_a_known_length(fn, needs, chunk, bodies):
    call = assembled(work_of(fn, needs=needs), chunk, chunk, "float32")
    assert there(call) == bodies
    assert call.bodies == (call.forward, call.forward_tail, call.backward, call.backward_tail)


def test_the_loops_have_lengths_of_their_own():
    call = assembled(work_of(head), 2, 4, "float32")
    forward, backward = (LoopSpec(*spec) for spec in (call.spec.forward_spec, call.spec.backward_spec))
    assert (forward.version, forward.chunk, backward.chunk) == (VERSION, 4, 2)
    assert there(call) == [True, True, True, False]


def test_where_only_run_time_knows_the_length_there_is_a_body_for_any():
    call = assembled(work_of(head, dynamic=True), 3, 3, "float32")
    assert there(call) == [True, True, True, True]
    (shape,) = (node.meta["val"].shape for node in call.forward_tail.module.graph.nodes if node.name.startswith("arg0"))
    assert isinstance(shape[0], torch.SymInt)


@pytest.mark.parametrize("dynamic", [False, True])
def test_bodies_of_all_lengths_come_from_one_trace(monkeypatch, dynamic):
    traces = []
    monkeypatch.setattr(stand_in, "trace", lambda *args: traces.append(args) or trace(*args))
    monkeypatch.setattr(body, "trace", None)
    work = work_of(head, dynamic=dynamic)
    graph = copy(work.stages.graph)  # no trace is known of it
    for chunk in (3, 4, 5):
        assert there(assembled(replace(work, stages=replace(work.stages, graph=graph)), chunk, chunk, "float32"))[0]
    assert len(traces) == 2


def with_logits(x, w):
    wide = x @ w
    return wide, wide.logsumexp(-1)


def test_the_backward_reads_upstream_gradients_then_reused_results_then_operands():
    call = assembled(work_of(with_logits, returned=1), 3, 3, "float32")
    assert (call.spec.differentiable, call.spec.reused, call.spec.wanted) == ((0, 1), (0,), (0, 1))
    assert LoopSpec(*call.spec.forward_spec).ins == ((0, 1, 1), None)
    assert LoopSpec(*call.spec.backward_spec).ins == ((0, 1, 1),) * 3 + ((0, 1, 1), None)
    in_forward = assembled(work_of(loss), 3, 3, "float32")
    assert LoopSpec(*in_forward.spec.backward_spec).ins == ((0, 1, 1), None)
    assert in_forward.spec.forward_spec == ()


def test_strides_of_the_backward_count_what_it_reads_first():
    x, w = torch.randn(T, D, requires_grad=True), torch.randn(V, D).t().requires_grad_()
    work = analysed(region_of(sketched(head, x, w)), mst_fx.Config(), {})
    call = assembled(work, 3, 3, "float32")
    assert LoopSpec(*call.spec.forward_spec).strides == ((1, (1, D)),)
    assert LoopSpec(*call.spec.backward_spec).strides == ((2, (1, D)),)


def sums(call):
    """The dtypes that gradients of weights add up in and are returned in."""
    return [(kind.dtype, kind.result) for kind in call.backward.outs if isinstance(kind, Sum)][-1]


@pytest.mark.parametrize(
    ("fn", "chunk", "accumulate", "dtypes"),
    [
        (head, 3, "float32", (torch.float32, torch.bfloat16)),
        (head, 3, "native", (torch.bfloat16, torch.bfloat16)),
        (loss, 3, "float32", (torch.float32, torch.float32)),  # backward casts while it scales
        (loss, 6, "float32", (torch.float32, torch.bfloat16)),  # one chunk is all
        (loss, 3, "native", (torch.bfloat16, torch.bfloat16)),
    ],
)
def test_dtypes_of_sums(fn, chunk, accumulate, dtypes):
    assert sums(assembled(work_of(fn, torch.bfloat16), chunk, chunk, accumulate)) == dtypes


@pytest.mark.parametrize("chunk", [3, 5])
def test_both_bodies_give_the_same_kinds_of_outputs(chunk):
    """A chunk of one position may end in other ops: then products stay in both bodies."""
    call = assembled(work_of(head), chunk, chunk, "float32")
    tail = call.backward_tail
    assert tail is None or tail.outs == call.backward.outs
    if chunk == 3:
        assert any(isinstance(kind, Outer) for kind in call.backward.outs)
