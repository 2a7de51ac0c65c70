"""Elementwise ops: always accepted, with broadcasting, along any dim."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from looping import Call, accepted_axes, aten_graph, loop_everything, looped, placed, placeholders, values
from strategies import broadcasts, chunk_by_chunk, shapes

from mst_fx.core.refusal import Reason, Refusal
from mst_fx.placement.placement import WHOLE, Split

aten = torch.ops.aten

OPERANDS = {
    aten.exp.default: 1,
    aten.tanh.default: 1,
    aten.gelu.default: 1,
    aten.silu.default: 1,
    aten.relu.default: 1,
    aten.leaky_relu.default: 1,
    aten.hardswish.default: 1,
    aten.clone.default: 1,
    aten.detach.default: 1,
    aten.alias.default: 1,
    aten.zeros_like.default: 1,
    aten.ones_like.default: 1,
    aten.add.Tensor: 2,
    aten.mul.Tensor: 2,
    aten.div.Tensor: 2,
    aten.rsub.Tensor: 2,
    aten.maximum.default: 2,
    aten.lt.Tensor: 2,
    aten.lerp.Tensor: 3,
    aten.addcmul.default: 3,
    aten.clamp.Tensor: 3,
    torch.logaddexp: 2,
}


def convert(x):
    return aten._to_copy.default(x, dtype=torch.float32)


def fill(x):
    return aten.full_like.default(x, 2.0)


def fill_where_positive(x, mask):
    return aten.masked_fill.Scalar(x, mask > 0, -1.0)


def choose(mask, a, b):
    return aten.where.self(mask > 0, a, b)


OPERANDS |= {convert: 1, fill: 1, fill_where_positive: 2, choose: 3}


@st.composite
def calls(draw):
    function = draw(st.sampled_from(list(OPERANDS)))
    shape = draw(shapes())
    others = [draw(broadcasts(shape)) for _ in range(OPERANDS[function] - 1)]
    operands = draw(st.permutations([shape, *others]))
    return Call(function, [values(*s, seed=i) for i, s in enumerate(operands)])


@given(st.data())
def test_chunk_by_chunk(data):
    assert chunk_by_chunk(data, data.draw(calls()))


@pytest.mark.parametrize("function", [f for f, count in OPERANDS.items() if count == 1])
def test_one_operand_keeps_its_split(function):
    assert placed(Call(function, [values(4, 6)]), Split(1, 2, 1)) == [Split(1, 2, 1)]


@pytest.mark.parametrize("function", [f for f, count in OPERANDS.items() if count == 2])
def test_a_short_operand_is_aligned_from_the_right(function):
    assert placed(Call(function, [values(6), values(4, 6)]), Split(0)) == [Split(1)]


@pytest.mark.parametrize("function", [f for f, count in OPERANDS.items() if count == 3])
def test_a_whole_operand_without_the_dim_stays_whole(function):
    assert placed(Call(function, [values(4, 6), values(6), values(1, 6)]), Split(0)) == [Split(0)]


@pytest.mark.parametrize("op", [aten.add.Tensor, aten.mul.Tensor])
def test_a_scalar_operand_stays_whole(op):
    # a sum at the end of a body is searched for products, also where an operand has no dim at all
    inputs = [values(4, 6), values()]
    module = aten_graph(Call(op, inputs))
    stages = loop_everything(module, placeholders(module)[0], Split(0))
    assert stages.placements.of[placeholders(module)[1]] == WHOLE
    torch.testing.assert_close(looped(module, stages, inputs, 3), [op(*inputs)])


def test_operands_split_along_different_dims_are_refused():
    with pytest.raises(Refusal) as refused:
        placed(Call(lambda x: x + x.t(), [values(4, 4)]), Split(0))
    assert refused.value.reason is Reason.AXIS_MIXED


def tagged_ops():
    """Ops that torch itself calls pointwise, with tensors for required arguments."""
    for full_name in sorted(torch._C._dispatch_get_all_op_names()):
        name, _, overload = full_name.removeprefix("aten::").partition(".")
        op = getattr(getattr(aten, name, None), overload or "default", None) if full_name.startswith("aten::") else None
        if op is None or torch.Tag.pointwise not in op.tags or op._schema.is_mutable or op._can_decompose():
            continue
        required = [argument for argument in op._schema.arguments if not argument.has_default_value()]
        if all(str(value.type) == "Tensor" for value in (*required, *op._schema.returns)):
            yield op, len(required)


def test_every_op_that_torch_tags_pointwise():
    inputs = [values(5, 3).abs(), values(5, 1, seed=1).abs(), values(3, seed=2).abs()]
    runnable = []
    for op, count in tagged_ops():
        try:
            one_result = isinstance(op(*inputs[:count]), torch.Tensor)
        except (RuntimeError, NotImplementedError, TypeError):
            continue  # for integers only
        if one_result:
            runnable.append((op, count))
    assert len(runnable) > 100
    call = Call(lambda *xs: [op(*xs[:count]) for op, count in runnable], inputs)
    module = aten_graph(call)
    stages = loop_everything(module, placeholders(module)[0], Split(0))
    torch.testing.assert_close(looped(module, stages, inputs, 2), call.function(*inputs), equal_nan=True)


@pytest.mark.parametrize("dim", [0, 1])
def test_two_results_are_refused_or_right(dim):
    # frexp is tagged pointwise, and its value is a tuple
    inputs = [values(4, 5)]
    call = Call(lambda x: [part.sum(dim) for part in torch.frexp(x)], inputs)
    module = aten_graph(call)
    for stages in accepted_axes(module, placeholders(module)[0], Split(0)):
        torch.testing.assert_close(looped(module, stages, inputs, 2), call.function(*inputs))
