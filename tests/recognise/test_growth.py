"""What a region takes in from a head, where its loop goes, and when it cannot stand in one place."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from graphs import captured, refusal_of, rewritten, tensors
from torch.utils._pytree import tree_leaves

T, D, V = 24, 4, 64


def inputs():
    torch.manual_seed(0)
    return [*(t.double().detach().requires_grad_() for t in tensors((T, D), (V, D))), torch.randint(0, V, (T,))]


def check(fn, regions=1, **options):
    """Loop it, compare results and gradients, return the report."""
    args = inputs()
    gm, report = rewritten(captured(fn, *args), **options)
    assert len(report.regions) == regions, str(report)
    by_name = dict(zip(("x", "w", "y"), args, strict=True))
    operands = [by_name[n.name.split("_")[1]] for n in gm.graph.nodes if n.op == "placeholder"]
    got, expected = tree_leaves(gm(*operands)), tree_leaves(fn(*args))
    torch.testing.assert_close(got, expected)
    assert [r.requires_grad for r in got] == [r.requires_grad for r in expected]
    for results in (got, expected):
        total = sum(r.sum() for r in results if r.requires_grad)
        results[:] = torch.autograd.grad(total, args[:2]) if isinstance(total, torch.Tensor) else []
    torch.testing.assert_close(got, expected)
    return report


def test_metrics_leave_the_scalar_alone():
    def fn(x, w, y):
        logits = F.linear(x, w)
        each = F.cross_entropy(logits, y, reduction="none")
        return each.mean(), each.detach().amax(), logits.argmax(-1)

    assert check(fn).regions[0].backward == "in_forward"


def test_a_product_with_a_matrix_for_each_token_keeps_tokens_apart():
    def fn(x, w, y):
        several = torch.stack([x, x.sin()], 1).unflatten(0, (2, T // 2))
        chances, shares = F.linear(several, w).softmax(-1), several.mean(-1).softmax(-1)
        return F.nll_loss(torch.einsum("btkv,btk->btv", chances, shares).log().flatten(0, 1), y)

    assert check(fn).regions[0].axis == f"dim 1 ({T // 2} positions)"


def test_two_scalars_recompute():
    def fn(x, w, y):
        each = F.cross_entropy(F.linear(x, w), y, reduction="none")
        return each.mean(), each.square().mean()

    assert check(fn).regions[0].backward == "recompute"


def test_an_operand_that_is_made_late_is_moved():
    def fn(x, w, y):
        logits = F.linear(x, w)
        shown = logits.logsumexp(-1).exp()
        index = (y + 1).remainder(V).unsqueeze(-1)
        return shown, logits.gather(-1, index).mean()

    check(fn)


def test_an_operand_that_is_drawn_late_is_not_moved():
    def fn(x, w, y):
        logits = F.linear(x, w)
        shown = torch.fft.fft(logits.logsumexp(-1)).real
        return shown, (logits * torch.rand(T, 1)).square().mean()

    refusal = refusal_of(fn, *inputs())
    assert refusal.reason == "NOT_CONVEX"
    assert refusal.op == "torch._C._fft.fft_fft"


def test_a_result_that_comes_back_is_taken_in():
    def fn(x, w, y):
        logits = F.linear(x, w)
        scale = logits.logsumexp(-1).sigmoid().unsqueeze(-1)
        return (logits * scale).square().mean()

    assert check(fn).regions[0].backward == "in_forward"


def test_a_result_that_comes_back_through_an_unknown_op():
    def fn(x, w, y):
        logits = F.linear(x, w)
        scale = torch.fft.fft(logits.logsumexp(-1)).real.unsqueeze(-1)
        return F.cross_entropy(logits * scale, y)

    refusal = refusal_of(fn, *inputs())
    assert refusal.reason == "UNKNOWN_OP"
    assert "torch.fft.fft(logits.logsumexp(-1))" in refusal.source


def test_a_part_is_looped_where_the_whole_cannot_be():
    def fn(x, w, y):
        each = F.cross_entropy(F.linear(x, w), y, reduction="none")
        return ((each - each.mean()) ** 2).mean()  # two passes over the tokens, of results only

    assert check(fn).regions[0].backward == "recompute"


def test_memory_that_is_written_in_between():
    def fn(x, w, y):
        x = x * 1
        logits = F.linear(x, w)
        x.add_(1)
        return F.cross_entropy(logits, y) + x.sum()

    assert refusal_of(fn, *inputs()).reason == "MUTATION"


def test_memory_that_is_written_behind_the_place():
    def late(x, w, y, mask):
        mask = mask * 1
        logits = F.linear(x, w)
        total = logits.logsumexp(-1)
        spectrum = torch.fft.fft(total)  # the loop must stand in front of this
        mask.add_(1)
        return (logits * mask).sum(-1), spectrum

    refusal = refusal_of(late, *inputs(), torch.ones(V))
    assert (refusal.reason, "add_" in refusal.op) == ("MUTATION", True)


def test_memory_that_is_written_before_it_is_read():
    def shifted(x, w, y):
        logits = F.linear(x, w)
        targets = torch.zeros_like(y).fill_(-100)
        targets[:-1] = y[1:]
        return F.cross_entropy(logits, targets)

    _, report = rewritten(captured(shifted, *inputs()))
    assert [region.pattern for region in report.regions] == ["head"]


def test_a_result_that_is_written_to_afterwards():
    def fn(x, w, y):
        each = F.cross_entropy(F.linear(x, w), y, reduction="none")
        shown = each.detach().clone()
        each = each * 1
        each[::2] = 0
        return each.sum(), shown

    check(fn)


def test_a_result_that_is_written_to_before_it_is_read_again():
    def fn(x, w, y):
        logits = F.linear(x, w)
        with torch.no_grad():
            top = logits.amax(-1)
            top.mul_(0.5)
            torch.fft.fft(top)
        return (logits - top.unsqueeze(-1)).exp().sum(-1).log().mean()

    check(fn)


def test_a_mask_that_is_written_into_the_logits():
    def fn(x, w, y):
        logits = F.linear(x, w)
        logits[:, 3:9] = -30.0
        logits[:, 0].mul_(2.0)
        return F.cross_entropy(logits, y.clamp(min=10))

    check(fn)


def test_no_grad_inside_detaches():
    def fn(x, w, y):
        logits = F.linear(x, w)
        with torch.no_grad():
            weight = (-F.cross_entropy(logits, y, reduction="none")).exp()
        return (F.cross_entropy(logits, y, reduction="none") * weight).mean()

    assert check(fn).regions[0].backward == "in_forward"


def test_a_head_under_no_grad_does_not_grow_beyond_it():
    def fn(x, w, y):
        with torch.no_grad():
            reference = F.cross_entropy(F.linear(x * 0.5, w), y, reduction="none")
        return ((F.cross_entropy(F.linear(x, w), y, reduction="none") - reference) ** 2).mean()

    assert [region.backward for region in check(fn, regions=2).regions] == ["none", "in_forward"]


def test_two_heads_that_meet_loop_together():
    def fn(x, w, y):
        return (F.linear(x, w).softmax(-1) * F.linear(x.tanh(), w * 2).log_softmax(-1)).sum(-1).mean()

    assert check(fn).regions[0].backward == "in_forward"


def test_two_heads_whose_results_meet_loop_apart():
    def fn(x, w, y):
        one = F.cross_entropy(F.linear(x, w), y, reduction="none")
        two = F.cross_entropy(F.linear(x.tanh(), w), y, reduction="none")
        return F.logsigmoid(one - two).mean()

    check(fn, regions=2)


@pytest.mark.parametrize("width", [V, V // 16])
def test_only_wide_projections_are_heads(width):
    gm = captured(lambda x, w, y: F.cross_entropy(F.linear(x, w[:width]), y % width), *inputs())
    _, report = rewritten(gm)
    assert len(report.regions) == (width == V)
    assert not report.refusals


def test_results_that_are_read_in_turns():
    def fn(x, w, y):
        a, b = F.linear(x, w), F.linear(x.tanh(), w)
        first = a.logsumexp(-1)
        second = (b.logsumexp(-1) * first).sigmoid()
        third = (a.amax(-1) * second).sigmoid()
        return (b.softmax(-1).amax(-1) * third).mean()

    check(fn, regions=2)
