"""What a node of a captured graph writes to: ops of every kind, functions that no schema tells of."""

from __future__ import annotations

import operator

import numpy as np
import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from beside import leaf, report_beside_eager
from graphs import captured

from mst_fx.recognise.effects import writes

MLP = (3, 7, 4), (4, 16), (16, 4)


def mlp(x, up, down):
    return (x @ up).tanh() @ down


def foreach(x, up, down, b):
    y = mlp(x, up, down)
    with torch.no_grad():
        torch._foreach_add_([b], 1.0)
    return y


def foreach_inside(x, up, down, b):
    h = x @ up
    torch._foreach_mul_([h], 2.0)
    return h @ down


def by_keyword(x, up, down, b):
    h = x @ up
    F.relu(input=h, inplace=True)
    return h @ down


def operand_by_keyword(x, up, down, b):
    h = x @ up + b
    torch.clamp_(input=b, min=0)
    return (h + b).tanh() @ down


def sorted_into(x, up, down, b):
    y = mlp(x, up, down)
    with torch.no_grad():
        torch.sort(up[0], out=(b, torch.empty(16, dtype=torch.long)))
    return y


def statistics(x, up, down, b):
    F.batch_norm((x @ up).flatten(0, 1), b, torch.ones_like(b), training=True)
    return mlp(x, up, down)


def observed(x, up, down, b):
    """Training for quantisation: the range and the scale that were seen are arguments far from the first."""
    on, zero = torch.ones(1, dtype=torch.long), torch.zeros(1, dtype=torch.int32)
    low, high, scale = torch.zeros(1), torch.zeros(1), torch.ones(1)
    h = (x @ up) * scale
    torch.fused_moving_avg_obs_fake_quant(x.detach().float(), on, on, low, high, scale, zero, 0.1, 0, 255, -1)
    return (h * scale).tanh() @ down, high


@pytest.mark.parametrize(
    "program",
    [foreach, foreach_inside, by_keyword, operand_by_keyword, sorted_into, statistics, observed],
    ids=lambda program: program.__name__,
)
def test_writes_of_every_kind_are_seen(program):
    """`beside_eager` compares what is left in the arguments, too."""
    report_beside_eager(
        program, inputs=lambda _: [*(leaf(*shape) for shape in MLP), torch.zeros(16, dtype=torch.float64)]
    )


def second(a, b):
    b.add_(a.sum())


def test_a_custom_op_writes_to_more_than_its_first_argument():
    with torch.library._scoped_library("mst_fx_tests", "FRAGMENT") as library:
        library.define("second(Tensor a, Tensor(b!) b) -> ()")
        library.impl("second", second, "CompositeExplicitAutograd")

        def program(x, up, down, a, b):
            h = x @ up + b
            torch.ops.mst_fx_tests.second(a, b)
            return (h + b).relu() @ down

        def inputs(_):
            return [*(leaf(*shape) for shape in MLP), *torch.ones(2, 16, dtype=torch.float64).unbind()]

        (refusal,) = report_beside_eager(program, inputs=inputs).refusals
        assert refusal.reason == "MUTATION"


def shifted_right(x, up, down, m):
    h = x @ up + m
    m >>= 1
    return (h + m).tanh() @ down


def by_its_dunder(x, up, down, m):
    h = x @ up + m
    m.__imul__(2)
    return (h + m).tanh() @ down


@pytest.mark.parametrize("program", [shifted_right, by_its_dunder], ids=lambda program: program.__name__)
def test_operators_in_place(program):
    report_beside_eager(program, inputs=lambda _: [*(leaf(*shape) for shape in MLP), torch.full((3, 7, 1), 8)])


@pytest.mark.parametrize("join", [operator.and_, operator.or_], ids=lambda join: join.__name__)
def test_operators_whose_names_end_as_those_in_place_write_nothing(join):
    def program(x, up, down, known):
        h = x @ up
        return (h * join(known, h > 0)) @ down

    def inputs(_):
        return [*(leaf(*shape) for shape in MLP), torch.arange(16) % 3 == 0]

    assert len(report_beside_eager(program, inputs=inputs).regions) == 1


@pytest.mark.parametrize("function", [torch.batch_norm, torch.ops.aten.batch_norm.default], ids=["torch", "aten"])
def test_running_statistics_of_functions_without_names(function):
    def program(x, up, down, mean, var):
        h = x @ up - mean
        rows = x.detach().repeat(1, 1, 4).flatten(0, 1)
        function(rows, None, None, mean, var, True, 0.1, 1e-5, False)
        return (h * mean).tanh() @ down

    (refusal,) = report_beside_eager(
        program, inputs=lambda _: [*(leaf(*shape) for shape in MLP), *torch.ones(2, 16).double().unbind()]
    ).refusals
    assert refusal.reason == "MUTATION"


class Scaled(torch.autograd.Function):
    """Its backward, which runs before that of what is in front of it, notes how large gradients are."""

    @staticmethod
    def forward(ctx, x, weight, scale):
        ctx.save_for_backward(x, weight)
        ctx.scale = scale
        return x * weight

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        ctx.scale.data.copy_(grad.abs().amax())
        return grad * weight, grad * x, None


def by_its_backward(x, up, down, count):
    return Scaled.apply((x @ up + count).tanh() @ down, down[0], count)


def filled_by_numpy(x, up, down, count):
    h = x @ up + count
    count.numpy().fill(2.0)
    return (h + count).tanh() @ down


def added_by_numpy(x, up, down, count):
    h = x @ up + count
    array = count.numpy()
    np.add(array, 1.0, array)
    return (h + count).tanh() @ down


def put_by_numpy(x, up, down, count):
    h = x @ up + count
    count.numpy().put([0, 1], [3.0, 4.0])
    return (h + count).tanh() @ down


@torch._dynamo.allow_in_graph
def counted(count, x):
    count.add_(1)
    return x * 2


@torch._dynamo.allow_in_graph
def counted_in_data(count, x):
    count.data.add_(1)
    return x * 2


class Counted(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, count):
        count.add_(1)
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        return grad * 2, None


def allowed_between(x, up, down, count):
    h = x @ up + count
    return (h + counted(count, x.detach()).mean() + count).tanh() @ down


def allowed_and_unread(x, up, down, count):
    counted(count, x.detach())
    return mlp(x, up, down)


def allowed_and_hidden(x, up, down, count):
    h = x @ up + count
    return (h + counted_in_data(count, x.detach()).mean() + count).tanh() @ down


def by_a_custom_function(x, up, down, count):
    h = x @ up + count
    y = Counted.apply(x, count)
    return (h + count).tanh() @ down + y


@pytest.mark.parametrize(
    "program",
    [
        *(allowed_between, allowed_and_unread, allowed_and_hidden, by_a_custom_function),
        *(by_its_backward, filled_by_numpy, added_by_numpy, put_by_numpy),
    ],
    ids=lambda program: program.__name__,
)
def test_functions_that_no_schema_tells_of(program):
    def inputs(_):
        return [*(leaf(*shape) for shape in MLP), torch.ones(16, dtype=torch.float64)]

    report_beside_eager(program, inputs=inputs, inner="aot_eager")


class Unpacked(torch.autograd.Function):
    """Its backward unpacks a weight, in place in memory of its own."""

    @staticmethod
    def forward(ctx, x, packed):
        ctx.save_for_backward(packed)
        return x @ packed

    @staticmethod
    def backward(ctx, grad):
        (packed,) = ctx.saved_tensors
        return grad @ packed.clone().mul_(1.0).t(), None


def test_memory_that_a_backward_makes_is_none_of_a_gradient_without_a_value():
    gm = captured(lambda x, packed: Unpacked.apply(x, packed) * 2, leaf(3, 4), torch.randn(4, 5, dtype=torch.float64))
    (function,) = [node for node in gm.graph.nodes if "autograd_function" in str(node.target)]
    for held in function.all_input_nodes:
        body = getattr(gm, str(held.target), None) if held.op == "get_attr" else None
        for given in body.graph.find_nodes(op="placeholder") if body is not None else ():
            if "grad" in given.name:
                given.meta.pop("example_value", None)  # as torch 2.11 leaves it
    assert not writes(function)
