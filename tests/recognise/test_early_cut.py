"""Cuts of logits along the tokens move in front of the projection."""

from __future__ import annotations

import expecttest
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from beside import beside_eager, leaf
from graphs import captured, rewritten, tensors, text

import mst_fx

B, T, D, V = 2, 12, 4, 32


def cuts(fn, *inputs, **options):
    gm, report = rewritten(captured(fn, *inputs), disable=("head",), **options)
    return gm, report.cuts


class TestGolden(expecttest.TestCase):
    def test_last_tokens(self):
        gm, (cut,) = cuts(lambda x, w: F.linear(x, w)[:, -3:] * 2, *tensors((B, T, D), (V, D)))
        self.assertExpectedInline(
            text(gm),
            """\
placeholder l_x_
placeholder l_w_
slice_1 = slice.Tensor(l_x_, 1, -3)
t_1 = t.default(l_w_)
clone = clone.default(slice_1, memory_format=torch.contiguous_format)
_unsafe_view_1 = _unsafe_view.default(clone, (6, 4))
mm_1 = mm.default(_unsafe_view_1, t_1)
view_1 = reshape.default(mm_1, (2, 3, 32))
mul = mul(view_1, 2)
return (mul)
""",
        )
        assert (cut.bytes_before, cut.bytes_after) == (B * T * V * 4, B * 3 * V * 4)
        assert "F.linear(x, w)[:, -3:] * 2" in cut.source

    def test_cut_and_returned(self):
        def both(x, w):
            logits = F.linear(x, w)
            return logits[:, :-1].logsumexp(-1), logits

        gm, _ = cuts(both, *tensors((B, T, D), (V, D)))
        self.assertExpectedInline(
            text(gm),
            """\
placeholder l_x_
placeholder l_w_
slice_1 = slice.Tensor(l_x_, 1, 0, -1)
t_1 = t.default(l_w_)
clone = clone.default(slice_1, memory_format=torch.contiguous_format)
_unsafe_view_1 = _unsafe_view.default(clone, (22, 4))
mm_1 = mm.default(_unsafe_view_1, t_1)
view_1 = reshape.default(mm_1, (2, 11, 32))
slice_2 = slice.Tensor(l_x_, 1, -1)
t_2 = t.default(l_w_)
view_2 = reshape.default(slice_2, (2, 4))
mm_2 = mm.default(view_2, t_2)
view_3 = reshape.default(mm_2, (2, 1, 32))
cat = cat.default((view_1, view_3), 1)
logsumexp = .logsumexp(view_1, -1)
return (logsumexp, cat)
""",
        )


@pytest.mark.parametrize(
    "cut",
    [
        lambda z: z[:, :-1],
        lambda z: z[:, -1],
        lambda z: z[:, 3],
        lambda z: z[:, 2:7].float().mul(0.5),
        lambda z: torch.tanh(z / 30)[..., 1:, :],
        lambda z: z.narrow(1, 4, 5),
        lambda z: z.select(1, -2),
        lambda z: z.view(B, 2, T // 2, V)[:, :, 1:],
        lambda z: z.transpose(0, 1)[2:],
        lambda z: z[1],
        lambda z: z[:, 4:][:, :2],
    ],
)
def test_results_and_gradients(cut):
    x, w, b = (t.double().detach().requires_grad_() for t in tensors((B, T, D), (V, D), (V,)))

    def fn(x, w, b):
        return cut(F.linear(x, w, b))

    gm, found = cuts(fn, x, w, b)
    assert len(found) >= 1
    expected, got = fn(x, w, b), gm(*named(gm, x=x, w=w, b=b))[0]
    torch.testing.assert_close(got, expected)
    upstream = torch.randn_like(expected)
    for value, exact in zip(*(torch.autograd.grad(y, (x, w, b), upstream) for y in (got, expected)), strict=True):
        torch.testing.assert_close(value, exact)
    rows = [n.meta["example_value"].numel() // V for n in gm.graph.nodes if "mm" in str(n.target)]
    assert max(rows) < B * T


@pytest.mark.parametrize(
    "kept",
    [
        slice(None, -1),
        slice(3, -2),
        slice(4, None),
        slice(0, 5),
        slice(-4, None),
        slice(7, -1),
        slice(-2, -5),
        slice(-40, 3),
        slice(-2, 2),
        5,
        -1,
    ],
)
def test_returned_results_are_joined_of_both_sides_of_the_cut(kept):
    x, w = (t.double().detach().requires_grad_() for t in tensors((B, T, D), (V, D)))

    def fn(x, w):
        logits = F.linear(x, w)
        return logits[:, kept].logsumexp(-1), logits

    gm, found = cuts(fn, x, w)
    assert len(found) == 1
    expected, got = fn(x, w), gm(*named(gm, x=x, w=w))
    torch.testing.assert_close(got, expected)
    totals = [first.sum() + logits.square().sum() for first, logits in (expected, got)]
    for exact, value in zip(*(torch.autograd.grad(total, (x, w)) for total in totals), strict=True):
        torch.testing.assert_close(value, exact)


def named(gm, **values):
    """The values in the order of the graph's placeholders."""
    return [values[n.name.split("_")[1]] for n in gm.graph.nodes if n.op == "placeholder"]


@pytest.mark.parametrize(
    "kept",
    [
        lambda z: z[..., :-4],  # classes
        lambda z: z[:, ::2],  # every other token
        lambda z: z.softmax(1)[:, 1:],  # tokens that depend on one another
        lambda z: z[:, 1:] + z[:, :-1],  # all tokens are read
        lambda z: z[:, torch.tensor([0, 1])],
        lambda z: z * 2,
    ],
)
def test_what_stays_as_it_is(kept):
    gm = captured(lambda x, w: kept(F.linear(x, w)), *tensors((B, T, D), (V, D)))
    after, report = rewritten(gm, disable=("head",))
    assert after is gm
    assert not report.cuts


def test_a_narrow_projection_stays():
    gm = captured(lambda x, w: F.linear(x, w)[:, 1:], *tensors((B, T, D), (D, D)))
    assert rewritten(gm)[0] is gm


def test_a_small_one_stays():
    gm = captured(lambda x, w: F.linear(x, w)[:, 1:], *tensors((B, T, D), (V, D)))
    after, report = rewritten(gm, min_bytes=B * T * V * 4 + 1)
    assert after is gm
    assert not report.cuts


def test_prefill_computes_the_last_token_only():
    model = torch.nn.Sequential(torch.nn.Embedding(V, D), torch.nn.Linear(D, V))
    with torch.no_grad():
        report = mst_fx.explain(lambda ids: model(ids)[:, -1:], torch.randint(0, V, (B, T)), options={"min_bytes": 0})
    assert [(cut.bytes_before // T, cut.bytes_after) for cut in report.cuts] == [(B * V * 4, B * V * 4)]
    assert "of logits" in str(report)


def scaled(logits, other):
    logits.mul_(0.5)
    return logits[:, :-1]


def scaled_twice(logits, other):
    logits *= 0.5
    logits.add_(1).tanh_()
    return logits[:, 1:]


def scaled_without_gradient(logits, other):
    with torch.no_grad():
        logits.mul_(0.5)
    return logits[:, :-1]


def added(logits, other):
    logits += other
    return logits[:, :-1]


def classes_forbidden(logits, other):
    logits[..., 3:] = -2.0
    return logits[:, :-1]


def tokens_written(logits, other):
    logits[:, 1] = other[:, 2]
    return logits[:, :-1]


def read_before(logits, other):
    before = logits.exp()
    logits.mul_(0.5)
    return logits[:, :-1] + before[:, :-1]


def written_behind(logits, other):
    cut = logits[:, :-1]
    logits.mul_(0.5)
    return cut


MOVED = (scaled, scaled_twice, scaled_without_gradient, added)
STAYING = (classes_forbidden, tokens_written, read_before, written_behind)


@pytest.mark.parametrize("write", [*MOVED, *STAYING], ids=lambda fn: fn.__name__)
def test_a_write_in_place_in_front_of_a_cut(write):
    def program(x, w, other):
        return write(F.linear(x, w), other).logsumexp(-1)

    (report,) = beside_eager(program, lambda _: [leaf(B, T, D), leaf(V, D), leaf(B, T, V)])
    assert len(report.cuts) == (write in MOVED), str(report)
    if write in MOVED:
        assert ["(11 positions)" in region.axis for region in report.regions] == [True]


def test_a_value_that_is_written_to_and_returned_is_cut_where_it_is():
    def program(x, w):
        logits = F.linear(x, w)
        logits.mul_(0.5)
        return logits[:, :-1].logsumexp(-1), logits

    (report,) = beside_eager(program, lambda _: [leaf(B, T, D), leaf(V, D)])
    assert not report.cuts
