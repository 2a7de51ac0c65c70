"""Every op that has a rule, called with every argument that it takes: a rule refuses, or chunks make up the whole."""

from __future__ import annotations

import operator
from collections import Counter
from functools import partial

import pytest
import torch
from arguments import Drawn, draw_call
from recipes import Draw
from torch.fx import Node
from torch.utils._pytree import tree_map_only

from mst_fx.core.aten_ops import ATTENTIONS, LINEAR_IN_ALL, LINEAR_IN_FIRST, LINEAR_IN_ONE
from mst_fx.core.torch_private.collectives import COLLECTIVES
from mst_fx.ops.overwritten import overwritten
from mst_fx.ops.own_gradients import own_gradients, upstream
from mst_fx.placement.placement import WHOLE, Split
from mst_fx.placement.propagate import propagate
from mst_fx.placement.rules.registry import _RULES
from mst_fx.verify.by_chunks import Program, check

aten = torch.ops.aten
CALLS = 14
"""Of each op, half of them with an operand that is split, half with a result that is needed split."""


def _gives_tensors(op) -> bool:
    results = {str(result.type) for result in op._schema.returns}
    elementwise = torch.Tag.pointwise in op.tags and not op._schema.is_mutable
    return elementwise and results == {"Tensor"} and not op._can_decompose()


def tagged():
    """Ops that torch itself calls pointwise."""
    for full_name in sorted(torch._C._dispatch_get_all_op_names()):
        name, _, overload = full_name.removeprefix("aten::").partition(".")
        op = getattr(getattr(aten, name, None), overload or "default", None) if full_name.startswith("aten::") else None
        if op is not None and _gives_tensors(op):
            yield op


OF_GPUS = set(ATTENTIONS) - {aten._scaled_dot_product_flash_attention_for_cpu.default}
UNCHECKED = {
    getattr(aten, "_grouped_mm", aten.mm).default: "runs on some devices alone; see the tests of routing",
    aten._scaled_mm.default: "takes float8; see the tests of contraction",
    getattr(getattr(aten, "_fused_rms_norm", aten.mm), "default", None): "as above; see the tests of reductions",
    aten.empty_like.default: "its values mean nothing; see the tests of elementwise ops",
    aten.empty.memory_format: "as above; see the tests of creation",
    aten.new_empty.default: "as above",
    aten.scalar_tensor.default: "has no dim to split",
    overwritten: "takes two values of one shape alone; see the tests of writes",
    upstream: "stands for a gradient, and is never run; see the tests of custom functions",
    own_gradients: "is never run; see the tests of custom functions",
    **dict.fromkeys(OF_GPUS, "runs on some devices alone; see the tests of attention"),
    **dict.fromkeys(COLLECTIVES, "communicates; see the tests of collectives"),
}
REFUSED = {
    *(aten.all.default, aten.any.default, aten.max.default, aten.min.default, aten.median.default),
    *(aten.nanmedian.default, aten.mean.default, aten.prod.default),  # over all dims; decompositions make a mean a sum
    *(aten.norm.Scalar, aten.frexp.Tensor, aten.randint.low),
}
"""Ops of which nothing may be split; their rules say why."""
OPS = sorted({*(op for op in _RULES if op != "pointwise"), *tagged()}, key=str)


def called(program: Program, op, drawn: Drawn):
    """The call, with an input for each of its tensors."""
    args, kwargs = tree_map_only(torch.Tensor, program.input, (drawn.args, drawn.kwargs))
    return program.call(op, *args, **kwargs)


def with_a_split_operand(op, drawn: Drawn) -> Counter[str]:
    program = Program()
    program.outputs = program.results(called(program, op, drawn))
    return check(program)


def with_a_split_result(op, drawn: Drawn, draw: Draw) -> Counter[str]:
    """Another value, which is split, is stacked on the result: the demand goes back through the op."""
    program = Program()
    result = draw.choice(program.results(called(program, op, drawn)))
    value = result.meta["val"]
    if not value.numel() or not value.dim():
        return Counter()
    other = program.input(value.clone())
    program.outputs = [program.call(aten.stack.default, [other, result])]
    return check(program, [other])


@pytest.mark.parametrize("op", [op for op in OPS if op not in UNCHECKED], ids=str)
def test_chunk_by_chunk(op):
    draw = Draw(str(op))
    found: Counter[str] = Counter()
    for number in range(CALLS):
        drawn = draw_call(op, draw)
        if drawn is None:
            pytest.fail(f"no call of {op._schema} was found that runs")
        found += with_a_split_result(op, drawn, draw) if number % 2 else with_a_split_operand(op, drawn)
    assert bool(found["accepted"]) != (op in REFUSED), f"{op}: {found}"


LINEAR = sorted({*LINEAR_IN_FIRST, *LINEAR_IN_ONE, *LINEAR_IN_ALL} - {operator.getitem, *COLLECTIVES}, key=str)


def sum_or_whole(program: Program, axis: Node, draw: Draw, value: torch.Tensor) -> Node:
    if draw.random() < 0.35 or not value.is_floating_point():
        return program.input(value)
    apart = program.call(aten.view.default, axis, [3, *[1] * value.dim()])
    return program.call(aten.sum.dim_IntList, program.call(aten.mul.Tensor, apart, program.input(value)), [0])


def divides_by_zero(drawn: Drawn) -> bool:
    divisor = [*drawn.args, *drawn.kwargs.values()][1]
    return bool((torch.as_tensor(divisor) == 0).any())


@pytest.mark.parametrize("op", LINEAR, ids=str)
def test_sums_in_chunks(op):
    """Operands that are sums over the axis, or whole: what the op makes of the parts adds up, or waits for the sum."""
    draw = Draw(f"sums, {op}")
    waited = Counter[bool]()
    for _ in range(3 * CALLS):
        program = Program()
        drawn = draw_call(op, draw)
        if op in (aten.div.Scalar, aten.div.Tensor) and divides_by_zero(drawn):
            continue  # the parts of a sum are no numbers then
        axis = program.input(draw.values([3]))
        operand = partial(sum_or_whole, program, axis, draw)
        args, kwargs = tree_map_only(torch.Tensor, operand, (drawn.args, drawn.kwargs))
        result = program.call(op, *args, **kwargs)
        program.outputs = program.results(result)
        check(program, [axis])
        placements = propagate(program.graph, {axis: Split(0)})
        waited[result in placements.epilogue] += placements.of.get(result) != WHOLE
    assert waited[False] > 0


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_a_sum_that_is_cut_off_waits(dtype):
    program = Program()
    x = program.input(torch.tensor([[0.6, 1.6], [0.6, -1.6]]))
    program.outputs = [program.call(aten.sum.default, program.call(aten.sum.dim_IntList, x, [0]), dtype=dtype)]
    assert program.outputs[0] in propagate(program.graph, {x: Split(0)}).epilogue
    check(program, [x])
