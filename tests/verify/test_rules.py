from __future__ import annotations

import pytest
import torch
from graphs import captured, rewritten
from torch import Tensor

import mst_fx
from mst_fx import rules
from mst_fx.placement.placement import Split
from mst_fx.placement.rules import registry

D = torch.float64


def differentiable(name, forward, backward, schema="(Tensor x) -> Tensor"):
    """A custom op of one operand, and one for its backward."""
    ops = {}
    for op_name, function, op_schema in (
        (name, forward, schema),
        (f"{name}_back", backward, "(Tensor g, Tensor x) -> Tensor"),
    ):
        op = torch.library.custom_op(f"mst_fx_tests::{op_name}", function, mutates_args=(), schema=op_schema)
        op.register_fake(lambda *args: torch.empty_like(args[0]))
        ops[op_name] = op
    ops[name].register_autograd(
        lambda ctx, g: ops[f"{name}_back"](g, *ctx.saved_tensors),
        setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0]),
    )
    return getattr(torch.ops.mst_fx_tests, name).default


SQUARE = differentiable("square", lambda x: x * x, lambda g, x: 2 * g * x)
UNIT = differentiable(
    "unit",
    lambda x: x / x.norm(dim=-1, keepdim=True),
    lambda g, x: torch.func.vjp(lambda x: x / x.norm(dim=-1, keepdim=True), x)[1](g)[0],
)
SCALED = differentiable("scaled", lambda x: x * 3, lambda g, x: g * x.norm())  # backward mixes what forward keeps apart


@torch.library.custom_op("mst_fx_tests::affine", mutates_args=())
def affine(x: Tensor, scale: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of x, a number for each row, a weight for all; half of each row comes back, and its sum."""
    y = x * scale[..., None] * weight
    return y[..., : y.shape[-1] // 2].clone(), y.sum(-1)


AFFINE = torch.ops.mst_fx_tests.affine.default
affine.register_fake(lambda x, scale, weight: (torch.empty_like(x[..., : x.shape[-1] // 2]), torch.empty_like(scale)))


@pytest.fixture(autouse=True)
def rules_given_back(monkeypatch):
    monkeypatch.setattr(registry, "_RULES", dict(registry._RULES))
    monkeypatch.setattr(registry, "_BACKS", dict(registry._BACKS))


def value(*shape, grad=True):
    return torch.randn(*shape, dtype=D, requires_grad=grad)


def test_an_op_with_a_rule_is_looped():
    def mlp(x, up, down):
        return torch.ops.mst_fx_tests.square(x @ up) @ down

    call = captured(mlp, value(2, 24, 8), value(8, 32), value(32, 8))
    _, report = rewritten(call)
    assert [refusal.reason for refusal in report.refusals] == ["UNKNOWN_OP"]
    mst_fx.register_rule(SQUARE, rules.ELEMENTWISE)
    _, report = rewritten(call)
    assert len(report.regions) == 1


@pytest.mark.parametrize(
    ("op", "family", "args"),
    [
        (SQUARE, rules.ELEMENTWISE, (value(4, 6),)),
        (SQUARE, rules.rows(), (value(2, 4, 6),)),
        (UNIT, rules.rows(), (value(4, 6),)),
        (AFFINE, rules.rows(), (value(3, 4, 6, grad=False), value(3, 4, grad=False), value(6, grad=False))),
    ],
    ids=lambda given: str(given) if isinstance(given, torch._ops.OpOverload) else "",
)
def test_a_right_rule_is_proved(op, family, args):
    mst_fx.register_rule(op, family)
    assert mst_fx.check_rule(op, *args) > 0


@pytest.mark.parametrize(
    ("op", "family", "args"),
    [
        (UNIT, rules.ELEMENTWISE, (value(4, 6),)),
        (UNIT, rules.rows(0), (value(4, 6),)),
        (SCALED, rules.ELEMENTWISE, (value(4, 6),)),
    ],
    ids=["a norm of rows as elementwise", "rows of nothing", "a backward that mixes"],
)
def test_a_wrong_rule_is_found(op, family, args):
    mst_fx.register_rule(op, family)
    with pytest.raises(AssertionError, match=str(op)):
        mst_fx.check_rule(op, *args)


def test_demands_are_only_a_guess():
    """What they forget costs loops: the rules decide, and refuse."""
    args = value(4, 4, 6, grad=False), value(4, 4, grad=False), value(6, grad=False)
    right = rules.rows()
    mst_fx.register_rule(AFFINE, right)
    expected = mst_fx.check_rule(AFFINE, *args)
    registry._BACKS[AFFINE] = lambda node, split: {node.args[0]: split}
    assert 0 < mst_fx.check_rule(AFFINE, *args) <= expected
    registry._BACKS[AFFINE] = lambda node, split: {node.args[2]: Split(0)}
    assert 0 < mst_fx.check_rule(AFFINE, *args) < expected


def test_a_split_within_a_row_is_refused_by_its_op():
    mst_fx.register_rule(UNIT, rules.rows())

    def mlp(x, up, down):
        return torch.ops.mst_fx_tests.unit((x @ up).mT).mT @ down

    call = captured(mlp, value(24, 8), value(8, 32), value(32, 8))
    _, report = rewritten(call)
    (refusal,) = report.refusals
    assert refusal.reason == "AXIS_MIXED"
    assert "mst_fx_tests.unit.default computes with all values of a row" in refusal.text


@pytest.mark.parametrize(
    ("op", "error", "text"),
    [
        (torch.ops.mst_fx_tests.square, TypeError, "is no overload"),
        (torch.ops.aten.add_.Tensor, ValueError, "writes to an operand"),
        (torch.ops.aten.add.Tensor, ValueError, "has a rule already"),
    ],
)
def test_what_can_have_no_rule(op, error, text):
    with pytest.raises(error, match=text):
        mst_fx.register_rule(op, rules.ELEMENTWISE)


def test_an_op_without_a_rule_cannot_be_checked():
    with pytest.raises(ValueError, match="has no rule"):
        mst_fx.check_rule(SQUARE, value(4, 6))
    with pytest.raises(ValueError, match="-1 dims"):
        rules.rows(-1)
