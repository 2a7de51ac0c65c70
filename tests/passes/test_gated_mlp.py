from __future__ import annotations

import expecttest
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from graphs import assert_idempotent, assert_untouched, captured, refusal_of, rewritten, tensors, text

import mst_fx

N, D, FF = 10, 8, 24


INPUTS = (N, D), (FF, D), (FF, D), (D, FF)


def swiglu(x, g, u, d):
    return F.linear(F.silu(F.linear(x, g)) * F.linear(x, u), d)


class TestGolden(expecttest.TestCase):
    def test_two_projections(self):
        gm = captured(swiglu, *tensors(*INPUTS))
        self.assertExpectedInline(
            text(gm),
            """\
placeholder l_x_
placeholder l_g_
placeholder l_u_
placeholder l_d_
linear = linear(l_x_, l_g_)
silu = silu(linear)
linear_1 = linear(l_x_, l_u_)
mul = mul(silu, linear_1)
linear_2 = linear(mul, l_d_)
return (linear_2)
""",
        )
        looped, _ = rewritten(gm)
        self.assertExpectedInline(
            text(looped),
            """\
placeholder l_x_
placeholder l_g_
placeholder l_u_
placeholder l_d_
get_attr mini_sequence_forward_0
get_attr mini_sequence_forward_tail_0
get_attr mini_sequence_backward_0
get_attr mini_sequence_backward_tail_0
mini_sequence = mini_sequence(
    mini_sequence_forward_0, mini_sequence_forward_tail_0, mini_sequence_backward_0, mini_sequence_backward_tail_0,
    recompute,
    (4, ((0, 1, 1), None, None, None), ((rows, 1, (0, 1, 1), (0, 8))), ()),
    (4, ((0, 1, 1), (0, 1, 1), None, None, None), ((rows, 2, (0, 1, 1), (0, 8)), (outer, torch.float32, torch.float32), (outer, torch.float32, torch.float32), (outer, torch.float32, torch.float32)), ()),
    (0),
    (0, 1, 2, 3),
    (),
    False,
    0,
    l_x_, l_g_, l_u_, l_d_)
getitem = getitem(mini_sequence, 0)
return (getitem)
""",
        )
        self.assertExpectedInline(
            text(looped.mini_sequence_forward_0),
            """\
placeholder arg0_1
placeholder arg1_1
placeholder arg2_1
placeholder arg3_1
t = t.default(arg1_1)
mm = mm.default(arg0_1, t)
silu = silu.default(mm)
t_1 = t.default(arg2_1)
mm_1 = mm.default(arg0_1, t_1)
mul = mul.Tensor(silu, mm_1)
t_2 = t.default(arg3_1)
return (mul, t_2)
""",
        )

    def test_fused_projection(self):
        def fused(x, gu, d):
            gate, up = F.linear(x, gu).chunk(2, dim=-1)
            return F.linear(up * F.silu(gate), d)

        looped, _ = rewritten(captured(fused, *tensors((1, N, D), (2 * FF, D), (D, FF))))
        self.assertExpectedInline(
            text(looped),
            """\
placeholder l_x_
placeholder l_gu_
placeholder l_d_
get_attr mini_sequence_forward_0
get_attr mini_sequence_forward_tail_0
get_attr mini_sequence_backward_0
get_attr mini_sequence_backward_tail_0
mini_sequence = mini_sequence(
    mini_sequence_forward_0, mini_sequence_forward_tail_0, mini_sequence_backward_0, mini_sequence_backward_tail_0,
    recompute,
    (4, ((1, 1, 1), None, None), ((rows, 1, (1, 1, 1), (1, 0, 8))), ()),
    (4, ((1, 1, 1), (1, 1, 1), None, None), ((rows, 1, (1, 1, 1), (1, 0, 8)), (outer, torch.float32, torch.float32), (outer, torch.float32, torch.float32)), ()),
    (0),
    (0, 1, 2),
    (),
    False,
    0,
    l_x_, l_gu_, l_d_)
getitem = getitem(mini_sequence, 0)
return (getitem)
""",
        )


def test_rewriting_twice_changes_nothing():
    assert_idempotent(swiglu, *tensors(*INPUTS))


@pytest.mark.parametrize(
    "fn",
    [
        lambda x, g, u, d: (F.silu(x @ g.t()) * (x @ u.t())) @ d.t(),
        lambda x, g, u, d: torch.einsum("nf,df->nd", F.linear(x, u) * F.gelu(F.linear(x, g), approximate="tanh"), d),
        lambda x, g, u, d: F.linear(F.linear(x, u).mul(torch.sigmoid(1.702 * F.linear(x, g))), d),
    ],
    ids=["operators", "einsum and GeGLU", "methods and a custom activation"],
)
def test_other_spellings(fn):
    _, report = rewritten(captured(fn, *tensors(*INPUTS)))
    assert [region.pattern for region in report.regions] == ["gated_mlp"]


def test_narrow_gate_is_no_mlp():
    assert_untouched(swiglu, *tensors((N, D), (4, D), (4, D), (D, 4)))


def test_attention_is_no_mlp():
    def attention(x, q, k, v, o):
        heads = [F.linear(x, w).view(1, N, 2, -1).transpose(1, 2) for w in (q, k, v)]
        return F.linear(F.scaled_dot_product_attention(*heads).transpose(1, 2).reshape(1, N, -1), o)

    assert_untouched(attention, *tensors((1, N, D), (FF, D), (FF, D), (FF, D), (D, FF)))


def test_escaping_intermediate():
    def escapes(x, g, u, d):
        hidden = F.silu(F.linear(x, g)) * F.linear(x, u)
        return F.linear(hidden, d), hidden

    refusal = refusal_of(escapes, *tensors(*INPUTS))
    assert (refusal.pattern, refusal.reason) == ("gated_mlp", "ESCAPES")
    assert refusal.text == "operator.mul is returned"
    assert "hidden = F.silu" in refusal.source


def test_other_small_values_made_of_the_intermediate():
    def measured(x, g, u, d):
        hidden = F.silu(F.linear(x, g)) * F.linear(x, u)
        return F.linear(hidden, d), hidden.abs().sum(), (hidden > 0).sum(-1)

    _, report = rewritten(captured(measured, *tensors(*INPUTS)))
    assert [region.pattern for region in report.regions] == ["gated_mlp"]


@pytest.mark.parametrize("mix", [lambda h: h.cumsum(0), lambda h: h.softmax(0), lambda h: h - h.amax(0)])
def test_tokens_that_depend_on_one_another(mix):
    refusal = refusal_of(
        lambda x, g, u, d: F.linear(mix(F.silu(F.linear(x, g)) * F.linear(x, u)), d), *tensors(*INPUTS)
    )
    assert (refusal.pattern, refusal.reason) == ("gated_mlp", "AXIS_MIXED")
    assert "test_gated_mlp.py" in refusal.source


def test_sum_over_tokens_and_every_token():
    def centred(x, g, u, d):
        hidden = F.silu(F.linear(x, g)) * F.linear(x, u)
        return F.linear(hidden - hidden.mean(0), d)

    assert refusal_of(centred, *tensors(*INPUTS)).reason == "TWO_PASSES"


def test_in_place_op_on_a_value_of_its_own():
    def in_place(x, g, u, d):
        return F.linear(F.silu(F.linear(x, g), inplace=True).mul_(F.linear(x, u)), d)

    _, report = rewritten(captured(in_place, *tensors(*INPUTS)))
    assert [region.pattern for region in report.regions] == ["gated_mlp"]


def test_in_place_op_on_a_live_in():
    def in_place(x, g, u, d):
        x = x * 2
        gate = F.silu(F.linear(x, g))
        return F.linear(gate * F.linear(x.mul_(3), u), d)

    assert refusal_of(in_place, *tensors(*INPUTS)).reason == "MUTATION"


def test_unknown_op():
    def unknown(x, g, u, d):
        return F.linear(torch.fft.fft(F.silu(F.linear(x, g)) * F.linear(x, u)).real, d)

    refusal = refusal_of(unknown, *tensors(*INPUTS))
    assert (refusal.reason, refusal.op) == ("UNKNOWN_OP", "torch._C._fft.fft_fft")


def test_autocast_that_begins_inside():
    # every node runs in the mode that it was written in
    def halfway(x, g, u, d):
        gate = F.linear(x, g)
        with torch.autocast("cpu", torch.bfloat16):
            return F.linear(F.silu(gate) * F.linear(x, u), d)

    looped, report = rewritten(captured(halfway, *tensors(*INPUTS)))
    assert [region.pattern for region in report.regions] == ["gated_mlp"]
    casts = [n for n in looped.mini_sequence_forward_0.graph.nodes if n.target == torch.ops.aten._to_copy.default]
    assert len(casts) >= 2  # of the gate's activation and of the stream


def test_one_row():
    assert refusal_of(swiglu, *tensors((1, D), *INPUTS[1:])).reason == "SHAPE"


def test_small_region():
    refusal = refusal_of(swiglu, *tensors(*INPUTS), min_bytes=10**6)
    assert refusal.reason == "SMALL"
    assert "min_bytes is 976.6 KiB" in refusal.text


def test_two_dims_known_at_run_time():
    x, *weights = tensors((3, N, D), *INPUTS[1:])
    torch._dynamo.mark_dynamic(x, 0)
    torch._dynamo.mark_dynamic(x, 1)
    (refusal,) = mst_fx.explain(swiglu, x, *weights, options={"min_bytes": 0}).refusals
    assert refusal.reason == "DYNAMIC"
