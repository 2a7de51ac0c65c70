"""Random token-wise functions, looped with their gradients and compared with eager execution in float64."""

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st
from looping import Call, check_loop, indices, learnt, values
from programs import ENDS, IGNORED, LAYOUTS, STEPS, Program, inputs_of, programs, run
from torch import nn


def call_of(program):
    return Call(lambda *inputs: run(program, *inputs), inputs_of(program))


@given(programs(), st.integers(1, 7), st.booleans(), st.booleans())
@settings(max_examples=40)
def test_random_programs(program, chunk, in_forward, any_length):
    stages = check_loop(call_of(program), chunk, in_forward, any_length)
    event(f"ragged: {stages.length % min(chunk, stages.length) > 0}")


ARGUMENTS = {
    "linear": ([4, 4], [4]),
    "activation": ("gelu",),
    "layer_norm": ([4], [4]),
    "rms_norm": ([4],),
    "scale": ([],),
    "gate": ("silu",),
    "per_head": (2,),
    "residual": ([4, 4],),
    "mask": (0.0,),
}


@pytest.mark.parametrize("step", [*STEPS, "mask"])
@pytest.mark.parametrize("sizes", [(1, 5, 4), (3, 4, 4)])
def test_every_step(step, sizes):
    steps = [("linear", [4, 4]), (step, *ARGUMENTS.get(step, ()))]
    stages = check_loop(call_of(Program(sizes, "BSD", steps, "value", "none")), 2)
    assert stages.length == sizes[1]


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("in_forward", [True, False])
def test_every_end(end, in_forward):
    check_loop(call_of(Program((3, 5, 4), "BSD", [("linear", [4, 4], [4])], end, "some")), 2, in_forward)


@pytest.mark.parametrize("before", LAYOUTS)
@pytest.mark.parametrize("after", LAYOUTS)
def test_every_layout(before, after):
    steps = [("linear", [4, 4]), ("layout", after), ("linear", [4, 4]), ("layout", before)]
    stages = check_loop(call_of(Program((3, 5, 4), before, steps, "head", "some")), 2)
    assert stages.length == (15 if before == after and "[" in before else 5)


@pytest.mark.parametrize("chunk", [1, 2, 3, 6, 7])
@pytest.mark.parametrize("any_length", [False, True])
def test_chunk_lengths(chunk, any_length):
    steps = [("linear", [4, 4], [4]), ("activation", "gelu"), ("linear", [2, 4])]
    check_loop(call_of(Program((3, 7, 4), "BSD", steps, "head", "first")), chunk, True, any_length)


def loss(x, w, labels, **options):
    return nn.functional.cross_entropy(
        (x @ w.t()).view(-1, w.shape[0]), labels.view(-1), ignore_index=IGNORED, **options
    )


@pytest.mark.parametrize("in_forward", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_chunk_without_any_label(in_forward, reduction):
    labels = indices(2, 6, below=5)
    labels[:, 2:4] = IGNORED
    function = lambda x, w, labels: loss(x, w, labels, reduction=reduction)  # noqa: E731
    check_loop(Call(function, [learnt(2, 6, 4), learnt(5, 4), labels]), 2, in_forward)


@pytest.mark.parametrize("in_forward", [True, False])
def test_no_label_at_all(in_forward):
    # the loss is nan, its gradients are not
    labels = torch.full((2, 6), IGNORED)
    check_loop(Call(loss, [learnt(2, 6, 4), learnt(5, 4), labels]), 4, in_forward)


@pytest.mark.parametrize("in_forward", [True, False])
def test_class_weights(in_forward):
    function = lambda x, w, labels, weight: loss(x, w, labels, weight=weight)  # noqa: E731
    inputs = [learnt(2, 6, 4), learnt(5, 4), indices(2, 6, below=5), values(5).abs()]
    check_loop(Call(function, inputs), 4, in_forward)


# what runs before the loop, and how gradients of whole operands add up


def test_what_only_depends_on_weights_runs_before_the_loop():
    def scaled(x, w, scale):
        return (x @ (w * scale.exp()).t()).relu()

    stages = check_loop(Call(scaled, [learnt(2, 6, 4), learnt(5, 4), learnt(5, 1)]), 4)
    assert [node.target for node in stages.prologue] == [torch.ops.aten.exp.default, torch.ops.aten.mul.Tensor]
    assert not set(stages.prologue) & set(stages.loop)


def test_a_weight_that_is_used_twice():
    check_loop(Call(lambda x, w: torch.tanh(x @ w) @ w.t(), [learnt(3, 5, 4), learnt(4, 6)]), 2)
    check_loop(Call(lambda x, w: torch.tanh(x @ w) @ w, [learnt(3, 5, 4), learnt(4, 4)]), 2)


def test_halves_of_one_weight():
    def gated(x, w):
        gate, up = w.chunk(2)
        return nn.functional.silu(x @ gate.t()) * (x @ up.t())

    check_loop(Call(gated, [learnt(3, 5, 4), learnt(12, 4)]), 2)


@pytest.mark.parametrize(("sizes", "length"), [((2, 5, 4), 5), ((5, 2, 4), 5)])
def test_a_result_in_merged_dims(sizes, length):
    steps = [("linear", [4, 4]), ("activation", "tanh"), ("layout", "[BS]D"), ("activation", "silu")]
    assert check_loop(call_of(Program(sizes, "BSD", steps, "value", "none")), 2).length == length


def test_a_result_that_depends_on_no_learnt_value_has_no_gradient():
    def masked(x, w, mask):
        return ((x @ w).sum(-1) * mask).sum() / mask.sum()

    stages = check_loop(Call(masked, [learnt(3, 5, 4), learnt(4, 4), values(3, 5).abs()]), 2)
    assert len(stages.results) == 1  # the sum of the mask is known before the loop
