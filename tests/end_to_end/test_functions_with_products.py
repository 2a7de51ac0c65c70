"""Custom autograd functions that hold several products, a whole MLP, or a head with its loss."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from beside import beside_eager, leaf
from fuzzing.harness import indices
from numerics import looped
from torch.autograd import Function


def rows(x):
    return x.flatten(0, -2)


def mlp_inputs(_):
    return [leaf(2, 24, 8), leaf(8, 32), leaf(32, 8)]


class Mlp(Function):
    """Saves what is wide; its gradient passes where the activation is cut off, if only little of it is."""

    @staticmethod
    def forward(ctx, x, up, down):
        h = x @ up
        ctx.save_for_backward(x, up, down, h)
        return h.relu() @ down

    @staticmethod
    def backward(ctx, grad):
        x, up, down, h = ctx.saved_tensors
        grad_h = (grad @ down.t()) * (h > -0.1)
        return grad_h @ up.t(), rows(x).t() @ rows(grad_h), rows(h.relu()).t() @ rows(grad)


class GatedMlp(Function):
    """Saves nothing that is wide, and computes it again in its backward."""

    @staticmethod
    def forward(ctx, x, up, down):
        ctx.save_for_backward(x, up, down)
        gate, value = (x @ up).chunk(2, -1)
        return (gate.sigmoid() * value) @ down

    @staticmethod
    def backward(ctx, grad):
        x, up, down = ctx.saved_tensors
        gate, value = (x @ up).chunk(2, -1)
        s, grad_h = gate.sigmoid(), grad @ down.t()
        grad_up = torch.cat([grad_h * value * s * (1 - s), grad_h * s], -1)
        return grad_up @ up.t(), rows(x).t() @ rows(grad_up), rows(s * value).t() @ rows(grad)


class WithAdapter(Function):
    """A projection and its adapter; the matrix is frozen."""

    @staticmethod
    def forward(ctx, x, w, a, b):
        ctx.save_for_backward(x, w, a, b)
        return x @ w + (x @ a) @ b

    @staticmethod
    def backward(ctx, grad):
        x, w, a, b = ctx.saved_tensors
        grad_a = grad @ b.t()
        return grad @ w.t() + grad_a @ a.t(), None, rows(x).t() @ rows(grad_a), rows(x @ a).t() @ rows(grad)


class GateAndUp(Function):
    """Two projections."""

    @staticmethod
    def forward(ctx, x, gate, up):
        ctx.save_for_backward(x, gate, up)
        return x @ gate, x @ up

    @staticmethod
    def backward(ctx, grad_gate, grad_up):
        x, gate, up = ctx.saved_tensors
        grad = grad_gate @ gate.t() + grad_up @ up.t()
        return grad, rows(x).t() @ rows(grad_gate), rows(x).t() @ rows(grad_up)


class HeadWithLoss(Function):
    """Makes its gradients in its forward."""

    @staticmethod
    def forward(ctx, x, head, y):
        scores = (x @ head).log_softmax(-1)
        hot = F.one_hot(y, scores.shape[-1]).to(x.dtype)
        grad = (scores.exp() - hot) / y.numel()
        ctx.save_for_backward(grad @ head.t(), x.t() @ grad)
        return -(scores * hot).sum() / y.numel()

    @staticmethod
    def backward(ctx, grad):
        of_x, of_head = ctx.saved_tensors
        return grad * of_x, grad * of_head, None


class LossOfEachToken(Function):
    """Makes its logits again in its backward."""

    @staticmethod
    def forward(ctx, x, head, y):
        logits = x @ head
        normaliser = logits.logsumexp(-1)
        ctx.save_for_backward(x, head, y, normaliser)
        return normaliser - logits.gather(-1, y[:, None])[:, 0]

    @staticmethod
    def backward(ctx, grad):
        x, head, y, normaliser = ctx.saved_tensors
        scores = (x @ head - normaliser[:, None]).exp()
        scores = (scores - F.one_hot(y, scores.shape[-1])) * grad[:, None]
        return scores @ head.t(), x.t() @ scores, None


class Opaque(Mlp):
    pass


torch.compiler.allow_in_graph(Opaque)


def with_adapter(x, up, down):
    return F.gelu(WithAdapter.apply(x, up.detach(), down[:8, :2], up[:2])) @ down


def gate_and_up(x, up, down):
    gate, value = GateAndUp.apply(x, up, up.cos())
    return (F.silu(gate) * value) @ down


def head_inputs(_):
    return leaf(48, 8), leaf(8, 64), indices(64, 48)


LOOPED = {
    "mlp": (lambda x, up, down: x + Mlp.apply(F.layer_norm(x, (8,)), up, down), mlp_inputs, "mlp"),
    "gated": (lambda x, up, down: GatedMlp.apply(x, up, down[:16]), mlp_inputs, "mlp"),
    "frozen": (lambda x, up, down: Mlp.apply(x, up.detach(), down.detach()), mlp_inputs, "mlp"),
    "a call": (lambda x, up, down: Opaque.apply(x, up, down) + x, mlp_inputs, "mlp"),
    "adapter": (with_adapter, mlp_inputs, "mlp"),
    "two projections": (gate_and_up, mlp_inputs, "gated_mlp"),
    "head": (lambda x, head, y: HeadWithLoss.apply(x, head, y) * 3, head_inputs, "head"),
    "tokens": (lambda x, head, y: (LossOfEachToken.apply(x, head, y) * x.sum(-1)).mean(), head_inputs, "head"),
}


@pytest.mark.parametrize("name", LOOPED)
def test_looped_with_the_gradients_of_the_function(name):
    program, inputs, pattern = LOOPED[name]
    (report,) = beside_eager(program, inputs)
    (region,) = report.regions
    saves_products = name == "head" and region.pattern == "mlp"  # torch 2.11 gives what is saved as results
    assert region.pattern == pattern or saves_products
    assert not any(entry.reason == "SUBGRAPH" for entry in report.unlooped)


def test_nothing_wide_is_saved():
    torch._dynamo.reset()
    x, up, down = mlp_inputs(0)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda value: saved.append(value.shape) or value, lambda value: value
    ):
        assert looped(Mlp.apply, num_chunks=3)(x, up, down).requires_grad
    assert sorted(saved) == sorted([x.shape, up.shape, down.shape])


class MixesTokens(Mlp):
    @staticmethod
    def backward(ctx, grad):
        x, up, down, h = ctx.saved_tensors
        grad_h = (grad / grad.norm() @ down.t()) * (h > -0.1)
        return grad_h @ up.t(), rows(x).t() @ rows(grad_h), rows(h.relu()).t() @ rows(grad)


def test_a_function_that_mixes_tokens_is_refused_with_op_and_line():
    (report,) = beside_eager(MixesTokens.apply, mlp_inputs)
    (refusal,) = report.refusals
    assert "norm" in refusal.text
    assert refusal.text.endswith("in a backward of its own")
    assert "grad / grad.norm() @" in refusal.source
    wide = [entry for entry in report.unlooped if entry.shape == (2, 24, 32)]
    assert {entry.why for entry in wide} == {refusal.text}


def test_what_the_plan_leaves_is_told():
    (report,) = beside_eager(Mlp.apply, mlp_inputs, num_chunks=None, memory_budget="64 GiB")
    assert not report.regions
    wide = [entry for entry in report.unlooped if entry.shape == (2, 24, 32)]
    assert wide
    assert all(entry.why.startswith("left by the plan") for entry in wide)
