from __future__ import annotations

import expecttest
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from graphs import assert_idempotent, assert_untouched, captured, refusal_of, rewritten, tensors, text

N, D, FF = 10, 8, 32


INPUTS = (2, N, D), (FF, D), (FF,), (D, FF), (D,)


def gelu_mlp(x, up, a, down, b):
    return F.linear(F.gelu(F.linear(x, up, a)), down, b)


class TestGolden(expecttest.TestCase):
    def test_linear(self):
        gm = captured(gelu_mlp, *tensors(*INPUTS))
        self.assertExpectedInline(
            text(gm),
            """\
placeholder l_x_
placeholder l_up_
placeholder l_a_
placeholder l_down_
placeholder l_b_
linear = linear(l_x_, l_up_, l_a_)
gelu = gelu(linear)
linear_1 = linear(gelu, l_down_, l_b_)
return (linear_1)
""",
        )
        looped, _ = rewritten(gm)
        self.assertExpectedInline(
            text(looped),
            """\
placeholder l_x_
placeholder l_up_
placeholder l_a_
placeholder l_down_
placeholder l_b_
get_attr mini_sequence_forward_0
get_attr mini_sequence_backward_0
mini_sequence = mini_sequence(
    mini_sequence_forward_0, None, mini_sequence_backward_0, None,
    recompute,
    (2, ((1, 1, 1), None, None, None, None), ((cat, 1, 1, 1)), ()),
    (2, ((1, 1, 1), (1, 1, 1), None, None, None, None), ((cat, 1, 1, 1), (outer, torch.float32, torch.float32), (sum, torch.float32, torch.float32), (outer, torch.float32, torch.float32), (sum, torch.float32, torch.float32)), ()),
    (0),
    (0, 1, 2, 3, 4),
    (),
    False,
    0,
    l_x_, l_up_, l_a_, l_down_, l_b_)
getitem = getitem(mini_sequence, 0)
return (getitem)
""",
        )

    def test_addmm_on_flattened_tokens(self):
        def conv1d(x, up, a, down, b):
            hidden = torch.addmm(a, x.view(-1, D), up).view(2, N, FF)
            return torch.addmm(b, torch.tanh(hidden).view(-1, FF), down).view(2, N, D)

        looped, _ = rewritten(captured(conv1d, *tensors((2, N, D), (D, FF), (FF,), (FF, D), (D,))))
        self.assertExpectedInline(
            text(looped),
            """\
placeholder l_x_
placeholder l_a_
placeholder l_up_
placeholder l_b_
placeholder l_down_
view = .view(l_x_, -1, 8)
get_attr mini_sequence_forward_0
get_attr mini_sequence_backward_0
mini_sequence = mini_sequence(
    mini_sequence_forward_0, None, mini_sequence_backward_0, None,
    recompute,
    (2, (None, (0, 2, 1), None, None, None), ((cat, 0, 2, 1)), ()),
    (2, ((0, 2, 1), None, (0, 2, 1), None, None, None), ((sum, torch.float32, torch.float32), (cat, 0, 2, 1), (outer, torch.float32, torch.float32), (sum, torch.float32, torch.float32), (outer, torch.float32, torch.float32)), ()),
    (0),
    (0, 1, 2, 3, 4),
    (),
    False,
    0,
    l_a_, view, l_up_, l_b_, l_down_)
getitem = getitem(mini_sequence, 0)
view_3 = .view(getitem, 2, 10, 8)
return (view_3)
""",
        )


def test_rewriting_twice_changes_nothing():
    assert_idempotent(gelu_mlp, *tensors(*INPUTS))


@pytest.mark.parametrize(
    "act",
    [
        lambda h: 0.5 * h * (1.0 + torch.tanh(0.79788456 * (h + 0.044715 * torch.pow(h, 3.0)))),
        lambda h: F.relu(h).square(),
        lambda h: h * torch.sigmoid(1.702 * h),
        lambda h: F.layer_norm(F.gelu(h), (FF,)),
        lambda h: F.dropout(F.gelu(h), 0.0),
    ],
    ids=["NewGELU", "squared ReLU", "QuickGELU", "norm inside", "dropout of nothing"],
)
def test_activations(act):
    fn = lambda x, up, a, down, b: F.linear(act(F.linear(x, up, a)), down, b)  # noqa: E731
    _, report = rewritten(captured(fn, *tensors(*INPUTS)))
    assert [region.pattern for region in report.regions] == ["mlp"]


def test_bottleneck_is_no_mlp():
    assert_untouched(gelu_mlp, *tensors((2, N, D), (4, D), (4,), (D, 4), (D,)))


def test_gated_takes_precedence():
    def gated(x, up, a, down, b):
        hidden = F.linear(x, up, a)
        return F.linear(F.silu(hidden[..., : FF // 2]) * hidden[..., FF // 2 :], down[:, : FF // 2], b)

    _, report = rewritten(captured(gated, *tensors(*INPUTS)))
    assert [region.pattern for region in report.regions] == ["gated_mlp"]


def test_random_op():
    def noisy(x, up, a, down, b):
        return F.linear(F.linear(x, up, a) * torch.randn(FF), down, b)

    def jittered(x, up, a, down, b):
        return F.linear(torch.normal(F.linear(x, up, a), 0.1), down, b)

    refusal = refusal_of(jittered, *tensors(*INPUTS))
    assert (refusal.pattern, refusal.reason) == ("mlp", "RANDOM")
    _, report = rewritten(captured(noisy, *tensors(*INPUTS)))  # drawn outside
    assert len(report.regions) == 1


def test_dropout():
    looped, report = rewritten(
        captured(lambda x, u, a, d, b: F.linear(F.dropout(F.linear(x, u, a)), d, b), *tensors(*INPUTS))
    )
    assert [region.pattern for region in report.regions] == ["mlp"]
    assert any(node.target == torch.ops.aten.randint.low for node in looped.graph.nodes)  # one seed, before the loop


def test_buffer_written_while_the_region_waits():
    def writes(x, up, a, down, b):
        x = x * 1
        hidden = F.gelu(F.linear(x, up, a))
        x.add_(1)
        return F.linear(hidden, down, b) + x

    assert refusal_of(writes, *tensors(*INPUTS)).reason == "MUTATION"
