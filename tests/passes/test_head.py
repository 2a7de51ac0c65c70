from __future__ import annotations

import expecttest
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from graphs import assert_idempotent, assert_untouched, captured, refusal_of, rewritten, text

N, D, V = 10, 8, 50


def inputs(batch=None):
    shape = (N, D) if batch is None else (batch, N, D)
    x, w = torch.randn(*shape, requires_grad=True), torch.randn(V, D, requires_grad=True)
    return x, w, torch.randint(0, V, shape[:-1])


def loss(x, w, y):
    return F.cross_entropy(F.linear(x, w).float().view(-1, V), y.view(-1))


class TestGolden(expecttest.TestCase):
    def test_mean(self):
        gm = captured(loss, *inputs())
        self.assertExpectedInline(
            text(gm),
            """\
placeholder l_x_
placeholder l_w_
placeholder l_y_
linear = linear(l_x_, l_w_)
float_1 = .float(linear)
view = .view(float_1, -1, 50)
view_1 = .view(l_y_, -1)
cross_entropy = cross_entropy(view, view_1)
return (cross_entropy)
""",
        )
        looped, _ = rewritten(gm)
        self.assertExpectedInline(
            text(looped),
            """\
placeholder l_x_
placeholder l_w_
placeholder l_y_
view_1 = .view(l_y_, -1)
ne = ne.Scalar(view_1, -100)
sum_1 = sum.default(ne, dtype=torch.float32)
get_attr mini_sequence_backward_0
get_attr mini_sequence_backward_tail_0
mini_sequence = mini_sequence(
    None, None, mini_sequence_backward_0, mini_sequence_backward_tail_0,
    in_forward,
    (),
    (4, ((0, 1, 1), None, (0, 1, 1), None), ((sum, torch.float32, torch.float32), (rows, 1, (0, 1, 1), (0, 8)), (outer, torch.float32, torch.float32)), ()),
    (0),
    (0, 1),
    (),
    False,
    0,
    l_x_, l_w_, view_1, sum_1)
getitem = getitem(mini_sequence, 0)
return (getitem)
""",
        )
        body = looped.mini_sequence_backward_0
        called = [node.target for node in body.graph.nodes if node.op == "call_function"]
        assert called.count(torch.ops.aten.mm.default) == 1  # the logits; the other products have left the body
        assert torch.ops.aten.nll_loss_forward.default in called
        sums = {torch.ops.aten._log_softmax_backward_data.default, torch.ops.aten.sum.dim_IntList}
        assert sums.isdisjoint(called)  # the gradient sums nothing up over the classes

    def test_batch_and_shifted_labels(self):
        def shifted(x, w, y):
            y = F.pad(y, (0, 1), value=-100)[..., 1:].contiguous()
            return F.cross_entropy(torch.tanh(F.linear(x, w) / 30).view(-1, V) * 30, y.view(-1), reduction="sum")

        looped, _ = rewritten(captured(shifted, *inputs(3)))
        self.assertExpectedInline(
            text(looped),
            """\
placeholder l_y_
placeholder l_x_
placeholder l_w_
pad = pad(l_y_, (0, 1), constant, -100)
getitem = getitem(pad, (Ellipsis, slice(1, None, None)))
y = .contiguous(getitem)
view_1 = .view(y, -1)
get_attr mini_sequence_backward_0
mini_sequence = mini_sequence(
    None, None, mini_sequence_backward_0, None,
    in_forward,
    (),
    (1, ((1, 1, 1), None, (0, 3, 1)), ((sum, torch.float32, torch.float32), (cat, 1, 1, 1), (outer, torch.float32, torch.float32)), ()),
    (0),
    (0, 1),
    (),
    False,
    0,
    l_x_, l_w_, view_1)
getitem_1 = getitem(mini_sequence, 0)
return (getitem_1)
""",
        )


def test_rewriting_twice_changes_nothing():
    assert_idempotent(loss, *inputs(2))


def test_per_token_losses_recompute():
    def per_token(x, w, y):
        return F.cross_entropy(F.linear(x, w), y, reduction="none")

    _, report = rewritten(captured(per_token, *inputs()))
    assert [region.backward for region in report.regions] == ["recompute"]


def test_logits_without_a_loss():
    refusal = refusal_of(lambda x, w, y: F.linear(x, w), *inputs())
    assert (refusal.pattern, refusal.reason) == ("head", "NO_LOSS")


def test_loss_without_a_head():
    refusal = refusal_of(lambda logits, y: F.cross_entropy(logits, y), torch.randn(N, V), torch.randint(0, V, (N,)))
    assert (refusal.pattern, refusal.reason) == ("head", "NO_HEAD")


def test_logits_of_an_op_that_nobody_knows_are_not_said_to_come_from_outside():
    def fn(x, w, y):
        return F.cross_entropy(F.conv1d(x, w, padding=1), y)

    refusal = refusal_of(fn, torch.randn(2, 4, 9), torch.randn(33, 4, 3), torch.randint(0, 33, (2, 9)))
    assert (refusal.pattern, refusal.reason) == ("head", "UNKNOWN_OP")
    assert "conv1d" in refusal.text


def test_narrow_head():
    assert_untouched(lambda x, w, y: F.cross_entropy(F.linear(x, w[: D // 2]), y % 4), *inputs())


def test_logits_that_an_unknown_op_reads():
    def sampled(x, w, y):
        logits = F.linear(x, w)
        return F.cross_entropy(logits, y), torch.fft.fft(logits).real.sum()

    refusal = refusal_of(sampled, *inputs())
    assert (refusal.pattern, refusal.reason) == ("head", "UNKNOWN_OP")
    assert refusal.op == "torch._C._fft.fft_fft"


@pytest.mark.parametrize("shift", [lambda z: z - z.mean(), lambda z: z - z.mean(0)])
def test_logits_centred_over_tokens(shift):
    refusal = refusal_of(lambda x, w, y: F.cross_entropy(shift(F.linear(x, w)), y), *inputs())
    assert refusal.reason == "TWO_PASSES"


def test_an_adapter_that_is_returned_is_no_head():
    down, up = torch.nn.Linear(8, 2, bias=False), torch.nn.Linear(2, 24, bias=False)
    assert_untouched(lambda x: up(down(x)), torch.randn(10, 8))
