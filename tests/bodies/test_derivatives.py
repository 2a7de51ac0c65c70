"""Derivatives of our own against autograd's."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from graphs import captured, rewritten
from hypothesis import given, settings
from hypothesis import strategies as st
from numerics import TOLERANCE, relative_error

from mst_fx.bodies.derivatives import _Picked

aten = torch.ops.aten
NONE, SUM = 0, 2


@settings(deadline=None, max_examples=60)
@given(
    tokens=st.integers(1, 9),
    classes=st.integers(1, 7),
    weighted=st.booleans(),
    reduction=st.sampled_from([NONE, SUM]),
    ignored=st.floats(0, 1),
    sure=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    seed=st.integers(0, 2**20),
)
def test_gradient_of_the_logits(tokens, classes, weighted, reduction, ignored, sure, dtype, seed):
    make = torch.Generator().manual_seed(seed)
    logits_TV = torch.randn(tokens, classes, generator=make, dtype=torch.float64).to(dtype)
    target_T = torch.randint(0, classes, (tokens,), generator=make)
    if sure:  # of what is right: the gradient is the difference of near numbers
        logits_TV = logits_TV * 12
        target_T = logits_TV.argmax(1)
    target_T[torch.rand(tokens, generator=make) < ignored] = -100
    weight_V = torch.rand(classes, generator=make, dtype=torch.float64) + 0.1 if weighted else None
    upstream = torch.randn([tokens] if reduction == NONE else [], generator=make, dtype=torch.float64)

    def gradient(own, dtype):
        x = logits_TV.to(dtype).requires_grad_()
        weight = None if weight_V is None else weight_V.to(dtype)
        scores = aten._log_softmax.default(x, 1, False)
        arguments = (scores, target_T, weight, reduction, -100)
        loss, _ = _Picked.apply(x, *arguments) if own else aten.nll_loss_forward.default(*arguments)
        return torch.autograd.grad(loss, x, upstream.to(dtype))[0].double()

    truth, eager, ours = gradient(False, torch.float64), gradient(False, dtype), gradient(True, dtype)
    assert relative_error(ours, truth) <= relative_error(eager, truth) * 1.01 + TOLERANCE[dtype]
    assert (ours[target_T == -100] == 0).all()


@pytest.mark.parametrize("keeps", [False, True], ids=["loss alone", "entropy as well"])
def test_other_readers_of_the_log_softmax_keep_theirs(keeps):
    def loss(x, w, y):
        scores = F.linear(x, w).log_softmax(-1)
        loss = F.nll_loss(scores, y, reduction="sum")
        return loss + (scores.exp() * scores).sum() if keeps else loss

    x, w = torch.randn(40, 8).requires_grad_(), torch.randn(64, 8).requires_grad_()
    looped, _ = rewritten(captured(loss, x, w, torch.randint(0, 64, (40,))))
    called = [node.target for node in looped.mini_sequence_backward_0.graph.nodes]
    assert called.count(aten._log_softmax_backward_data.default) == int(keeps)
    assert aten.nll_loss_backward.default not in called
