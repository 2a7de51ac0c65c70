"""Random ops inside a region: the right distribution, and in backward the very mask of the forward."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from graphs import refusal_of, tensors
from looping import Call, aten_graph, loop_everything, placeholders, run_forward
from numerics import looped
from torch.utils.checkpoint import checkpoint

from mst_fx.capture.decompositions import decompositions
from mst_fx.ops.seeded_random import uniform_like
from mst_fx.placement.partition import partition
from mst_fx.placement.placement import Split

B, T, D, FF, P = 2, 40, 8, 64, 0.3


def test_numbers_are_uniform():
    torch.manual_seed(0)
    u = uniform_like(torch.empty(1000, 1000))
    assert 0 <= float(u.min()) < float(u.max()) < 1
    assert float(u.mean()) == pytest.approx(0.5, abs=2e-3)
    assert float(u.var()) == pytest.approx(1 / 12, rel=1e-2)
    counts = u.histc(256, 0, 1)
    assert 150 < float((counts - counts.mean()).square().sum() / counts.mean()) < 360  # chi-squared, 255 degrees


@pytest.mark.parametrize("shift", [(0, 1), (1, 0), (1, 1), (0, 7)])
def test_neighbours_are_independent(shift):
    torch.manual_seed(1)
    u = uniform_like(torch.empty(1000, 1000)) - 0.5
    v = u.roll(shift, (0, 1))
    assert abs(float((u * v).mean() * 12)) < 5e-3
    assert abs(float(((u > 0) == (v > 0)).float().mean()) - 0.5) < 2.5e-3


def test_draws_differ_and_follow_the_seed():
    x = torch.empty(50, 50)
    torch.manual_seed(2)
    first, second = uniform_like(x), uniform_like(x)
    torch.manual_seed(2)
    assert torch.equal(uniform_like(x), first)
    assert abs(float(torch.corrcoef(torch.stack([first.flatten(), second.flatten()]))[0, 1])) < 0.1


def test_positions_past_32_bits_have_numbers_of_their_own():
    torch.manual_seed(3)
    base = torch.empty(1).expand(2**33 // 8, 8)  # no memory of this size is needed
    rows = torch.tensor([0, 2**29])  # 2^32 elements apart
    from mst_fx.ops.seeded_random import _mixed  # the same steps on two rows

    assert base.numel() > 2**32
    position = rows.unsqueeze(1) * 8 + torch.arange(8)
    low = _mixed(position & 0xFFFFFFFF)
    assert torch.equal(low[0], low[1])
    assert not torch.equal(_mixed(low ^ (position >> 32))[0], _mixed(low ^ (position >> 32))[1])


@pytest.mark.parametrize("split", [Split(0), Split(1), Split(2)])
@pytest.mark.parametrize("chunk", [1, 3, 5])
def test_numbers_do_not_depend_on_the_chunks(split, chunk):
    x = torch.ones(4, 6, 5, dtype=torch.float64)
    module = aten_graph(Call(lambda x: F.dropout(x, P), [x]), decompositions(), functional=True)
    stages = loop_everything(module, placeholders(module)[0], split)
    env = {}
    for node in module.graph.nodes:  # what runs before the loop runs once for both
        if node in stages.prologue:
            env[node] = node.target(*[env.get(a, a) for a in node.args], **node.kwargs)
    operands = [env.get(node, x) for node in stages.operands]
    (whole,), (parts,) = run_forward(stages, operands, 6), run_forward(stages, operands, chunk)
    assert torch.equal(whole, parts)
    assert set(whole.unique().tolist()) == {0.0, 1 / (1 - P)}


@pytest.mark.parametrize(
    ("draw", "mean"),
    [
        (lambda x: torch.native_dropout(x, P, True)[0], 1.0),
        (lambda x: torch.native_dropout(x, P, True)[1].double(), 1 - P),
        (lambda x: torch.native_dropout(x, P, False)[0], 1.0),
        (lambda x: F.dropout(x, P), 1.0),
        (lambda x: F.dropout(x, 1.0), 0.0),
        (lambda x: torch.bernoulli(x, 0.25), 0.25),
        (torch.rand_like, 0.5),
    ],
)
def test_every_op_that_is_opened(draw, mean):
    x = torch.ones(300, 100, dtype=torch.float64)
    module = aten_graph(Call(draw, [x]), decompositions(), functional=True)
    drawn = [n.target for n in module.graph.nodes if torch.Tag.nondeterministic_seeded in getattr(n.target, "tags", ())]
    assert set(drawn) <= {torch.ops.aten.randint.low}
    torch.manual_seed(6)
    assert float(module(x).mean()) == pytest.approx(mean, abs=0.02)


def test_a_seed_is_drawn_before_the_loop():
    x = torch.ones(6, 5, dtype=torch.float64)
    module = aten_graph(Call(lambda x: x + torch.randint(0, 9, ()), [x]))
    stages = partition(module, placeholders(module)[0])
    assert [node.target for node in stages.prologue] == [torch.ops.aten.randint.low]


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
