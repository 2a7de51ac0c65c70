"""What runs before, in and after the loop; what a loop reads and gives."""

import pytest
import torch
from looping import Call, aten_graph, placeholders, values

from mst_fx.core.refusal import Reason, Refusal
from mst_fx.placement.partition import partition
from mst_fx.placement.placement import Split

aten = torch.ops.aten


def stages_of(function, *inputs):
    module = aten_graph(Call(function, inputs))
    return partition(module, placeholders(module)[0])


def targets(nodes):
    return [node.target for node in nodes]


def test_each_op_runs_before_in_or_after_the_loop():
    def norm(x, w):
        return (x @ w.exp().t()).square().sum().sqrt()

    stages = stages_of(norm, values(6, 5), values(3, 5))
    assert (stages.axis, stages.length) == (Split(0), 6)
    assert targets(stages.prologue) == [aten.exp.default]
    assert targets(stages.loop) == [aten.t.default, aten.mm.default, aten.pow.Tensor_Scalar, aten.sum.default]
    assert targets(stages.epilogue) == [aten.sqrt.default]
    assert stages.operands == (stages.stream, *stages.prologue)
    assert (stages.results, stages.outputs) == (stages.loop[-1:], stages.epilogue)


def test_an_output_that_no_chunk_makes_is_refused():
    with pytest.raises(Refusal, match="does not depend on the split axis") as refused:
        stages_of(lambda x, w: [x + 1, w.exp()], values(6, 5), values(3, 5))
    assert refused.value.reason is Reason.AXIS_MIXED


def test_a_seed_is_drawn_before_the_loop():
    stages = stages_of(lambda x: x + torch.randint(0, 9, ()), values(6, 5))
    assert targets(stages.prologue) == [aten.randint.low]
