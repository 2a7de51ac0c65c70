"""One call in place of a region: bodies that are shared, stages around the loop, and the layout that readers expect."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from graphs import sketched
from looping import returned

import mst_fx
from mst_fx.bodies.call import assembled
from mst_fx.bodies.splice import Replacement, loop
from mst_fx.bodies.work import analysed
from mst_fx.recognise.reader import Reader
from mst_fx.recognise.rebuild import Edit, rebuilt
from mst_fx.recognise.region import close
from mst_fx.runtime.mini_sequence import CallSpec, mini_sequence

T, D, V = 6, 4, 8


def spliced(fn, *shapes, chunk=4, regions=1, needs=True, saves_results=False):
    """The graph with its first calls as loops, in as many regions of one length; and the graph as it was."""
    gm = sketched(fn, *(torch.randn(shape, dtype=torch.float64, requires_grad=needs) for shape in shapes))
    nodes = [node for node in gm.graph.nodes if node.op.startswith("call")]
    size = len(nodes) // regions
    works, calls, edits = {}, {}, []
    for start in range(0, regions * size, size):
        part = nodes[start : start + size]
        part[-1].meta["stack_trace"] = f"line {start}"
        region = close(Reader(gm), part, part[0].all_input_nodes[0])
        work = analysed(region, mst_fx.Config(), works)
        call = calls.setdefault(work, assembled(work, chunk, chunk, "float32"))
        edits.append(Edit(region, partial(loop, replacement=Replacement(region, work.stages, call, saves_results))))
    return rebuilt(gm, edits), gm


def names(gm):
    return [node.target if isinstance(node.target, str) else node.target.__name__ for node in gm.graph.nodes]


def calls_of(gm):
    return gm.graph.find_nodes(op="call_function", target=mini_sequence)


def assert_same(looped, gm, *shapes, gradients=True):
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    ours, theirs = looped(*inputs), gm(*inputs)
    torch.testing.assert_close(ours, theirs)
    assert ours.squeeze().stride() == theirs.squeeze().stride()
    if gradients:
        torch.testing.assert_close(*(torch.autograd.grad(y.square().sum(), inputs) for y in (ours, theirs)))


def head(x, w):
    return (x @ w).logsumexp(-1)


def test_a_call_stands_in_the_place_of_a_region():
    looped, gm = spliced(head, (T, D), (D, V))
    assert_same(looped, gm, (T, D), (D, V))
    (call,) = calls_of(looped)
    assert "example_value" not in call.meta
    assert call.meta["stack_trace"] == "line 0"
    (result,) = returned(looped)
    assert result.meta["example_value"].shape == (T,)
    assert [name for name, _ in looped.named_children()] == [
        f"mini_sequence_{body}_0" for body in ("forward", "forward_tail", "backward", "backward_tail")
    ]
    assert not list(gm.named_children())


def test_a_body_that_is_not_there_is_none():
    looped, _ = spliced(head, (T, D), (D, V), chunk=3)
    (call,) = calls_of(looped)
    forward, forward_tail, backward, backward_tail = call.args[:4]
    assert (forward_tail, backward_tail) == (None, None)
    assert [looped.get_submodule(body.target) is not None for body in (forward, backward)] == [True, True]


@pytest.mark.parametrize("saves_results", [False, True])
def test_what_is_saved_is_told_in_the_literals(saves_results):
    looped, _ = spliced(head, (T, D), (D, V), needs=False, saves_results=saves_results)
    (call,) = calls_of(looped)
    assert CallSpec(*call.args[4]).saves_results == saves_results


def test_regions_that_are_alike_share_their_bodies():
    def twice(x, w):
        return ((x @ w).tanh() @ w).tanh().sin()

    looped, gm = spliced(twice, (T, D), (D, D), regions=2)
    assert_same(looped, gm, (T, D), (D, D))
    one, other = calls_of(looped)
    assert [body.target for body in one.args[:4]] == [body.target for body in other.args[:4]]
    assert len(list(looped.named_children())) == 4
    unlike, _ = spliced(lambda x, w: ((x @ w).tanh() @ w).relu().sin(), (T, D), (D, D), regions=2, needs=False)
    assert len(list(unlike.named_children())) == 4  # forward and its tail, of two kinds


def test_what_runs_once_stands_around_the_call():
    def of_a_sum(x, w):
        return (x.tanh() @ w.exp()).logsumexp(-1).sum().sin()

    looped, gm = spliced(of_a_sum, (T, D), (D, V))
    assert_same(looped, gm, (T, D), (D, V))
    once = [name.split(".")[0] for name in names(looped) if "." in name or name == "mini_sequence"]
    assert once == ["exp", "mini_sequence", "sin"]


@pytest.mark.parametrize(
    ("layout", "moved"),
    [
        (lambda y: y, False),
        (lambda y: y.transpose(0, 1), True),
        (lambda y: y.permute(2, 0, 1), True),
        (lambda y: y.amax(0, keepdim=True).permute(1, 2, 0), False),  # a dim of one position may have any stride
    ],
)
def test_results_lie_in_memory_as_they_were_captured(layout, moved):
    shapes = (2, T, D), (D, V)
    looped, gm = spliced(lambda x, w: layout((x @ w).tanh()), *shapes, needs=False)
    assert_same(looped, gm, *shapes, gradients=False)
    assert ("contiguous" in names(looped)) == moved
