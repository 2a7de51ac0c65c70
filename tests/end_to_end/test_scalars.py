"""Floats of a program that is compiled for any value: operands of a loop, or fixed where an op needs a number."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from numerics import assert_as_good_as_eager, gradients, looped, relative_error
from torch import nn

import mst_fx

D, FF, V = 16, 64, 96


class Scaled(nn.Module):
    """A norm by hand, an MLP and a head, each with floats of its own that are read with `self`."""

    def __init__(self, inner=lambda self, h: h * self.scale):
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down, self.head = nn.Linear(D, FF), nn.Linear(FF, D), nn.Linear(D, V)
        self.eps, self.scale, self.z = 1e-2, 0.7, 1e-3
        self.inner = inner

    def forward(self, x, labels):
        h = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)
        x = x + self.down(self.inner(self, F.gelu(self.up(h))))
        logits = self.head(x)
        z_loss = torch.logsumexp(logits, -1).pow(2).mean()
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten()) + self.z * z_loss


def inputs(length=40):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, length, D, generator=generator), torch.randint(V, (2, length), generator=generator)


@pytest.fixture(autouse=True)
def _reset():
    torch._dynamo.reset()


def assert_same(model, compiled, given):
    eager, ours = gradients(model, model, given), gradients(model, compiled, given)
    assert all(relative_error(ours[name], value) < 2e-6 for name, value in eager.items())


def test_one_compile_serves_all_values_and_lengths():
    model = Scaled()
    compiled = looped(model, dynamic=True)
    before = len(mst_fx.reports())
    for value, length in ((0.7, 40), (0.3, 40), (2.5, 53)):
        model.scale, model.z, model.eps = value, value / 100, value / 10
        assert_same(model, compiled, inputs(length))
    (report,) = mst_fx.reports()[before:]
    assert [region.pattern for region in report.regions] == ["mlp", "head"]


def test_a_float_that_changes_is_an_operand_from_then_on():
    """Dynamo takes a float for a constant until it sees another one."""
    model = Scaled()
    compiled = looped(model)
    before = len(mst_fx.reports())
    for step in range(5):
        model.z = 1e-3 * (step + 1)
        assert_same(model, compiled, inputs())
    assert len(mst_fx.reports()) - before == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_number_is_not_rounded_to_half_precision(dtype):
    x = torch.linspace(1, 2, 2 * 64 * D).view(2, 64, D).to(dtype)
    up, down = torch.eye(FF, D, dtype=dtype), torch.eye(D, FF, dtype=dtype)

    def mlp(x, shift):
        return F.linear(F.relu(F.linear(x, up)) + shift, down)

    compiled = looped(mlp)
    compiled(x, 0.3)
    torch.testing.assert_close(compiled(x, 0.7), (x.double() + 0.7).to(dtype), rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "inner",
    [
        lambda self, h: torch.where(h > self.scale, h, self.scale),
        lambda self, h: (1.0 - self.scale) * h,
        lambda self, h: h / h.shape[1],
        lambda self, h: h + (h > self.eps) * self.scale,
        lambda self, h: h.pow(self.scale + 1.3),
        lambda self, h: F.leaky_relu(h, self.scale),
        lambda self, h: torch.add(h, h, alpha=self.scale),
        lambda self, h: h.clamp(max=self.scale) / self.scale,
    ],
    ids=["where", "arithmetic", "length", "mask", "pow", "leaky_relu", "alpha", "clamp"],
)
def test_ways_to_read_a_number(inner):
    model = Scaled(inner)
    report = assert_as_good_as_eager(model, inputs(), dtype=torch.float32, regions=2, dynamic=True)
    assert not report.refusals


@pytest.mark.slow
def test_a_number_that_an_op_needs_is_fixed_for_every_layer():
    """Layers that are alike share one body, which holds the value: another value compiles anew, in whatever layer."""
    layers = [Scaled() for _ in range(2)]
    for layer in layers:
        layer.inner = lambda self, h: F.leaky_relu(h, self.scale)

    def all_of_them(x, labels):
        return sum(layer(x, labels) for layer in layers)

    compiled = looped(all_of_them, dynamic=True, inner="eager")  # others fix a number that nobody reads any more
    for changed in (None, *reversed(layers)):
        if changed is not None:
            changed.scale = 0.2
        torch.testing.assert_close(compiled(*inputs()), all_of_them(*inputs()))


@pytest.mark.parametrize(("read", "looped_too"), [(F.leaky_relu, False), (torch.mul, True)])
@torch._dynamo.config.patch(capture_scalar_outputs=True)
def test_a_number_that_depends_on_the_data(read, looped_too):
    """It is an operand like any other; an op that needs it as a number is refused."""
    model = Scaled(read)

    def program(x, labels):
        return model.head(x + model.down(read(F.gelu(model.up(x)), x.abs().max().item()))).logsumexp(-1).sum()

    given = inputs()
    torch.testing.assert_close(looped(program)(*given), program(*given))
    report = mst_fx.reports()[-1]
    assert [region.pattern for region in report.regions] == (["mlp", "head"] if looped_too else ["head"])
    if not looped_too:
        (refused,) = report.refusals
        assert refused.reason == "NUMBER"
        assert refused.text == "aten.leaky_relu.default takes a number that depends on the data"
        assert "model.down(read(F.gelu(model.up(x))" in refused.source


@pytest.mark.slow
def test_layers_that_differ_in_nothing_share_their_bodies(monkeypatch):
    from mst_fx.bodies import work

    seen = []
    once = work._analysed
    monkeypatch.setattr(work, "_analysed", lambda *given: seen.append(given) or once(*given))
    layers = nn.ModuleList(Scaled() for _ in range(4))
    looped(lambda x, y: sum(layer(x, y) for layer in layers), dynamic=True)(*inputs())
    of_four = len(seen)
    torch._dynamo.reset()
    seen.clear()
    looped(lambda x, y: sum(layer(x, y) for layer in layers[:2]), dynamic=True)(*inputs())
    assert len(seen) == of_four


def test_a_program_that_is_captured_anew_keeps_its_loops(caplog):
    """Dynamo starts again where a number must be fixed after all: that is no failure of the looped graph."""
    tried = []

    def inner(gm, _):
        tried.append(gm)
        if len(tried) == 1:
            raise torch._dynamo.exc.TensorifyScalarRestartAnalysis(restart_reason="a number is fixed")
        return gm

    model, given = Scaled(), inputs()
    before = len(mst_fx.reports())
    compiled = looped(model, inner=inner, strict=False)
    torch.testing.assert_close(compiled(*given), model(*given))
    assert len(tried) == 2
    assert len(mst_fx.reports()) - before == 1
    assert not [
        record for record in caplog.records if record.name.startswith("mst_fx") and record.levelname == "WARNING"
    ]
