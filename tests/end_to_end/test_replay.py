"""Random ops inside a region: in backward the very mask of the forward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from graphs import refusal_of, tensors
from numerics import looped
from torch.utils.checkpoint import checkpoint

B, T, D, FF, P = 2, 40, 8, 64, 0.3


def mlp(x, up, down):
    return F.linear(F.dropout(F.gelu(F.linear(x, up)), P), down)


def revealing():
    """Operands for which the result tells the mask: the down-projection picks the first D features."""
    torch.manual_seed(4)
    x, up = torch.randn(B, T, D, dtype=torch.float64), torch.randn(FF, D, dtype=torch.float64)
    return [x.requires_grad_(), up.requires_grad_(), torch.eye(FF, dtype=torch.float64)[:D].clone()]


@pytest.mark.parametrize(
    ("inner", "checkpointed"),
    [
        ("eager", False),  # checkpointed dropout differs there in backward without us, too (torch 2.11 to 2.15)
        ("aot_eager", False),
        ("aot_eager", True),
        ("inductor", False),
        ("inductor", True),
    ],
)
def test_backward_has_the_mask_of_the_forward(inner, checkpointed):
    torch._dynamo.reset()
    function = (lambda *args: checkpoint(mlp, *args, use_reentrant=False)) if checkpointed else mlp
    x, up, down = revealing()
    result = looped(function, inner=inner)(x, up, down)
    hidden = F.gelu(F.linear(x, up))
    seen = (result.detach() / hidden.detach()[..., :D]).nan_to_num()  # far below zero, GELU is zero
    assert (seen != 0).double().mean() == pytest.approx(1 - P, abs=0.06)
    upstream = torch.sin(torch.arange(result.numel(), dtype=torch.float64)).view(result.shape)
    result.backward(upstream)
    got, (x.grad, up.grad) = (x.grad, up.grad), (None, None)
    mask = torch.cat([seen, torch.zeros(B, T, FF - D)], -1)
    (F.linear(hidden * mask, down) * upstream).sum().backward()
    torch.testing.assert_close(got, (x.grad, up.grad), rtol=1e-9, atol=1e-12)


def test_gradients_in_the_forward_have_the_mask_too():
    def loss(x, w):
        return (F.dropout(F.linear(x, w), P) * torch.arange(FF)).sum()

    torch._dynamo.reset()
    x, w, _ = revealing()
    compiled = looped(loss)
    torch.manual_seed(5)
    value = compiled(x, w)
    value.backward()
    # the loss is linear in w: its value is <gradient, w>
    assert float((w.grad * w).sum()) == pytest.approx(float(value), rel=1e-9)
    torch.manual_seed(5)
    assert float(compiled(x, w)) == float(value)
    assert float(compiled(x, w)) != float(value)


def test_dropout_that_is_off():
    torch._dynamo.reset()
    x, up, down = revealing()
    compiled = looped(lambda *args: F.linear(F.dropout(F.gelu(F.linear(*args[:2])), P, training=False), args[2]))
    torch.testing.assert_close(compiled(x, up, down), F.linear(F.gelu(F.linear(x, up)), down))


def test_other_random_ops_are_refused():
    def noisy(x, up, down):
        hidden = F.linear(x, up)
        return F.linear(hidden + torch.randn_like(hidden), down)

    refusal = refusal_of(noisy, *tensors((10, D), (FF, D), (D, FF)))
    assert refusal.reason == "RANDOM"
