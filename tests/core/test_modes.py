"""Blocks of autocast, no_grad and inference mode in a program: around checkpointed blocks, around parts of regions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from beside import beside_eager, leaf
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import mst_fx

INNER = ["eager", "aot_eager"]


def half(*, enabled=True):
    return torch.autocast("cpu", torch.bfloat16, enabled=enabled)


def mlp(x, up, down):
    return (x @ up).tanh() @ down


def recomputed(x, up, down):
    return checkpoint(mlp, x, up, down, use_reentrant=False)


def around(x, up, down):
    with half():
        return recomputed(x, up, down)


def around_one_of_two(x, up, down):
    with half():
        first = recomputed(x, up, down)
    return first, recomputed(x, up, down)


def switched_off_around(x, up, down):
    with half():
        wide = x @ up
        with half(enabled=False):
            return recomputed(x, up, down), wide


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize(
    "program", [around, around_one_of_two, switched_off_around], ids=lambda program: program.__name__
)
def test_autocast_around_a_checkpointed_block(program, inner):
    torch.manual_seed(0)
    torch._dynamo.reset()
    given = [torch.randn(shape, requires_grad=True) for shape in ((3, 40, 8), (8, 32), (32, 8))]
    options = {"min_bytes": 0, "num_chunks": 3, "strict": True, "inner": inner}
    expected, made = program(*given), torch.compile(program, backend="mst_fx", options=options)(*given)
    assert len(mst_fx.reports()[-1].regions) == 1 + (program is around_one_of_two)
    for ours, eager in zip(*((y if isinstance(y, tuple) else (y,)) for y in (made, expected)), strict=True):
        assert ours.dtype == eager.dtype
        torch.testing.assert_close(ours, eager, rtol=1e-2, atol=1e-2)
        grads = [torch.autograd.grad(y.float().square().sum(), given[:2], retain_graph=True) for y in (ours, eager)]
        for mine, truth in zip(*grads, strict=True):
            assert float((mine - truth).norm() / truth.norm()) < 0.02


def without_gradients_around(x, up, down):
    with torch.no_grad():
        target = recomputed(x, up, down)
    return (recomputed(x, up, down) - target * 2).square().sum()


def measured(x, up, down):
    logits = x @ up
    with torch.inference_mode():
        best = (logits.argmax(-1) == 3).double().mean()
    return F.cross_entropy(logits.flatten(0, 1), torch.arange(21) % 16), best


def teacher(x, up, down):
    with torch.inference_mode():
        target = (x @ up).softmax(-1)
    return F.kl_div((x @ (up * 2)).log_softmax(-1), target.clone(), reduction="sum") + down.sum()


def half_a_region(x, up, down):
    with torch.inference_mode():
        h = x @ up
    return h.clone().tanh() @ down


def beside_a_region(x, up, down):
    with torch.inference_mode():
        target = mlp(x, up, down)
    return mlp(x, up, down) + target


def alone(x, up, down):
    with torch.inference_mode():
        target = mlp(x, up, down)
    return x * 2 + target + down.sum()


def decorated(x, up, down):
    @torch.inference_mode()
    def entropy(logits):
        return torch.special.entr(logits.softmax(-1)).sum(-1).mean()

    logits = x @ up
    return F.cross_entropy(logits.flatten(0, 1), torch.arange(21) % 16), entropy(logits)


PROGRAMS = [without_gradients_around, measured, teacher, half_a_region, beside_a_region, alone, decorated]


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_no_gradient_comes_from_blocks_without(program, inner):
    def inputs(_):
        return [leaf(3, 7, 4), leaf(4, 16), leaf(16, 4)]

    if program in (beside_a_region, alone) and inner == "aot_eager" and torch.__version__ < "2.12":
        pytest.skip("AOTAutograd does not compile it, and leaves the process in a state that no later compile works in")
    (report,) = beside_eager(program, inputs, inner=inner)
    assert {refusal.reason for refusal in report.refusals} <= {"GRAD_MODE"}
    assert len(report.regions) == {without_gradients_around: 2, alone: 0}.get(program, 1)


def forward_mode(x, up, down):
    with forward_ad.dual_level():
        pair = forward_ad.make_dual(x, x.detach() * 2)
        made = mlp(pair, up, down)
        tangent = forward_ad.unpack_dual(made).tangent
    return mlp(x, up, down), tangent.detach()


def test_forward_mode_is_left_alone():
    def inputs(_):
        return [leaf(3, 7, 4), leaf(4, 16), leaf(16, 4)]

    (report,) = beside_eager(forward_mode, inputs, inner="aot_eager")
    assert len(report.regions) == 1
    assert [refusal.reason for refusal in report.refusals] == ["GRAD_MODE"]
    assert "forward mode" in report.refusals[0].text


def penalty(x, up, down):
    y = mlp(x, up, down)
    (grad,) = torch.autograd.grad(y.sum(), (x,), create_graph=True)
    return y, (grad.norm(dim=-1) - 1).square()


def step(x, up, down):
    loss = mlp(x, up, down).square().sum()
    return x - torch.autograd.grad(loss, (x,))[0], mlp(x * 2, up, down)


@pytest.mark.skipif(not hasattr(torch._dynamo.config, "trace_autograd_ops"), reason="torch cannot capture it")
@pytest.mark.parametrize("program", [penalty, step], ids=lambda program: program.__name__)
def test_gradients_within_the_program_are_left_alone(program):
    def inputs(_):
        return [leaf(3, 7, 4), leaf(4, 16), leaf(16, 4)]

    with torch._dynamo.config.patch(trace_autograd_ops=True):
        (report,) = beside_eager(program, inputs, inner="aot_eager")
    assert len(report.regions) == (program is step)
    assert [refusal.reason for refusal in report.refusals] == ["GRAD_MODE"]
    assert "is differentiated within the graph" in report.refusals[0].text


def enabled_behind_the_projection(x, up, down):
    wide = x @ up
    with torch.enable_grad():
        return (wide.tanh() @ down).square().sum()


def enabled_behind_the_logits(x, up, down):
    logits = x @ up
    with torch.enable_grad():
        return F.cross_entropy((logits * down.sum(1)).flatten(0, 1), torch.arange(120) % 32)


@pytest.mark.parametrize("inner", INNER)
@pytest.mark.parametrize(
    "program", [enabled_behind_the_projection, enabled_behind_the_logits], ids=lambda program: program.__name__
)
def test_gradients_that_are_off_around_the_call(program, inner):
    """The function begins in the mode of its caller, so what stands in front of `enable_grad` is not recorded."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    given = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 40, 8), (8, 32), (32, 8))]
    options = {"min_bytes": 0, "num_chunks": 3, "strict": True, "inner": inner}
    grads = []
    for function in (program, torch.compile(program, backend="mst_fx", options=options)):
        with torch.no_grad():
            loss = function(*given)
        grads.append(torch.autograd.grad(loss, given, allow_unused=True))
    assert [grad is None for grad in grads[0]] == [grad is None for grad in grads[1]] == [True, True, False]
    torch.testing.assert_close(grads[1][2], grads[0][2])
