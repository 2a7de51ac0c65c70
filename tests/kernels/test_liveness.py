"""How many wide values a backward body holds at once: what becomes a buffer, and what is overwritten."""

from __future__ import annotations

import predictions
import pytest
import torch
from graphs import captured, rewritten
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_leaves

from mst_fx.kernels.liveness import Step, last_reads, most_alive, peak

CHUNK = 16
SIZES = predictions.Sizes(t=64, d=32, ff=128, v=512)


@pytest.mark.parametrize(
    ("program", "reductions_apart", "ordered", "unordered"),
    [
        (predictions.swiglu, True, 4, 6),
        (predictions.swiglu, False, 4, 6),
        (predictions.gelu, True, 2, 3),
        (predictions.gelu, False, 2, 3),
        (predictions.normed, True, 2, 3),
        (predictions.normed, False, 3, 4),  # a norm's gradient does not overwrite what the same kernel reduces
        (predictions.pre_normed, True, 4, 6),  # two products of the body read what the kernel makes
        (predictions.pre_normed, False, 4, 6),
    ],
)
def test_wide_values_of_a_backward(program, reductions_apart, ordered, unordered):
    """As many as Inductor's kernels have wide arguments, on a CPU and on a GPU."""
    inputs = predictions.inputs_of(program, SIZES, torch.float32, "cpu")
    looped, _ = rewritten(captured(program, *inputs), chunk_tokens=CHUNK)

    def wide(node):
        parts = tree_leaves(node.meta["val"])
        return any(part.numel() == CHUNK * SIZES.ff for part in parts if part is not None)

    body = looped.mini_sequence_backward_0.graph
    for in_order, expected in ((True, ordered), (False, unordered)):
        assert peak(body, wide, reductions_apart=reductions_apart, ordered=in_order) == expected


BYTES = {"a": 10, "b": 10, "c": 3, "small": 1}


def most(*steps, returned=(), multiplied=()):
    return most_alive(steps, last_reads(steps, returned, multiplied), BYTES.__getitem__)


def step(reads, makes, *overwrites):
    return Step(frozenset(reads), tuple(makes), overwrites)


@pytest.mark.parametrize(
    ("second", "expected"),
    [
        (step(["a"], ["b"]), 20),  # both while b is made of a
        (step(["a"], ["b"], ("a", "b")), 10),  # b lies where a was
        (step(["a"], ["small"], ("a", "small")), 11),  # one of another size cannot
    ],
)
def test_a_step_holds_what_it_reads_and_makes(second, expected):
    assert most(step([], ["a"]), second, returned=second.makes) == expected


def test_what_a_later_step_reads_is_not_overwritten():
    steps = [step([], ["a"]), step(["a"], ["b"], ("a", "b")), step(["a"], ["small"])]
    assert most(*steps) == 20


def test_what_nobody_reads_again_is_gone():
    assert most(step([], ["a"]), step(["a"], ["c"]), step(["c"], ["b"])) == 13
    assert most(step([], ["a"]), step(["a"], ["c"]), step(["c"], ["b"]), returned=["a"]) == 23


def test_factors_of_a_gradient_are_gone_as_soon_as_both_are_there():
    steps = [step([], ["a"]), step([], ["c"]), step([], ["b"])]
    assert most(*steps, returned="abc") == 23
    assert most(*steps, returned="abc", multiplied=[("a", "c")]) == 13


def test_the_gradient_of_a_weight_follows_that_of_the_tokens():
    """The product that makes b reads one of the factors: the other one is there until then."""
    steps = [step([], ["a"]), step([], ["c"]), step(["c"], ["b"]), step(["b"], ["small"])]
    assert most(*steps, returned=["a", "c", "small"], multiplied=[("a", "c")]) == 23


def capped(x, w):
    return (30 * torch.tanh(x @ w.t() / 30)).log_softmax(-1)[:, 0].sum()


def capped_twice(x, w):
    wide = torch.tanh(x @ w.t())
    return wide.amax(-1).sum() + wide[:, 0].sum()


def gated(x, w):
    wide = torch.sigmoid(x @ w.t())
    return wide * 2, wide + 1


@pytest.mark.parametrize(("program", "expected"), [(capped, 2), (capped_twice, 2), (gated, 3)])
def test_costly_values_that_several_loops_read_are_written(program, expected):
    """The products are kept. The readers of the gate are one loop, which writes both results, and not the gate."""
    with FakeTensorMode():
        graph = make_fx(program)(torch.empty(16, 8), torch.empty(64, 8)).graph
    wide = (16, 64)
    kept = [node for node in graph.nodes if node.target == torch.ops.aten.mm.default][:1]

    def size(node):
        return node.meta["val"].shape == wide if isinstance(node.meta["val"], torch.Tensor) else 0

    found = [
        peak(graph, size, reductions_apart=True, ordered=False, costly_once=once, kept=kept) for once in (False, True)
    ]
    assert found == [expected - (program is not gated), expected]
