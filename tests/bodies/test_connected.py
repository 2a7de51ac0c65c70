"""Which gradients exist in a loop: of what is detached, compared or counted there are none, and no zeros."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from beside import beside_eager, leaf
from looping import Call, aten_graph, learnt, placeholders

from mst_fx.bodies.connected import connected
from mst_fx.capture.decompositions import decompositions
from mst_fx.core.refusal import Refusal
from mst_fx.placement.partition import partition

T, D, V = 5, 4, 6


def stages_of(fn, *inputs):
    module = aten_graph(Call(fn, inputs), decompositions())
    return partition(module, placeholders(module)[0])


def gradients(fn, reached=None):
    """Operands that get a gradient and results that have one, of tokens and two weights; all operands want one."""
    stages = stages_of(fn, learnt(T, D), learnt(D, V), learnt(D, V))
    ends = stages.results if reached is None else [stages.results[i] for i in reached]
    return connected(stages, range(len(stages.operands)), ends)


def gated(gate):
    return lambda x, w, v: (x @ w).tanh() * gate(x, w, v)


@pytest.mark.parametrize(
    ("fn", "operands", "results"),
    [
        (gated(lambda x, w, v: x @ v), (0, 1, 2), (0,)),
        (gated(lambda x, w, v: (x @ v).detach()), (0, 1), (0,)),
        (gated(lambda x, w, v: x @ v > 0), (0, 1), (0,)),
        (gated(lambda x, w, v: (x @ v).argsort(-1)), (0, 1), (0,)),
        (gated(lambda x, w, v: torch.ones_like(x @ v)), (0, 1), (0,)),
        (lambda x, w, v: x.detach() @ w + x.detach() @ v, (1, 2), (0,)),
        (lambda x, w, v: ((x @ w).argmax(-1), x @ v), (0, 2), (1,)),  # an index has no gradient
        (lambda x, w, v: (x @ w + x @ v).argmax(-1), (), ()),
        (lambda x, w, v: (x @ w + x @ v).detach(), (), ()),
    ],
)
def test_what_has_a_gradient(fn, operands, results):
    stages = stages_of(fn, learnt(T, D), learnt(D, V), learnt(D, V))
    inputs = stages.graph.find_nodes(op="placeholder")
    wanted, ends = connected(stages, range(len(stages.operands)), stages.results)
    assert [stages.operands[i] for i in wanted] == [inputs[i] for i in operands]
    assert ends == results


def test_no_gradient_comes_back_from_results_that_are_not_reached():
    both = lambda x, w, v: ((x @ w).tanh().argsort(-1), x @ w, x @ v)  # noqa: E731
    assert gradients(both)[1] == (1, 2)
    assert gradients(both, reached=[1])[1] == (1,)
    assert gradients(both, reached=[1])[0] != gradients(both)[0]
    assert gradients(both, reached=[]) == ((), ())


def heaviside(x, w, v):
    h = (x @ w).tanh()
    return torch.heaviside(h, h.detach()) * (x @ v), (x @ v).exp()


def test_an_op_without_a_derivative_may_make_what_no_gradient_comes_back_from():
    assert gradients(heaviside, reached=[1])[1] == (1,)
    with pytest.raises(Refusal) as refusal:
        gradients(heaviside)
    assert refusal.value.node.target == torch.ops.aten.heaviside.default


def test_values_in_merged_dims():
    stages = stages_of(lambda x, w: (x @ w).flatten(0, 1).relu(), learnt(2, T, D), learnt(D, V))
    assert connected(stages, (1,), stages.results) == ((1,), (0,))


def step_of_values(x, up, other, down):
    h = F.silu(x @ up)
    return torch.heaviside(h, h.detach()) * h @ down, (x @ other).amax(-1)


def step_that_is_compared(x, up, other, down):
    h = F.silu(x @ up)
    return (torch.heaviside(h, h.detach()) > 0) * h @ down, (x @ other).amax(-1)


@pytest.mark.parametrize("program", [step_of_values, step_that_is_compared], ids=lambda program: program.__name__)
def test_an_op_without_a_derivative_is_refused_where_a_gradient_needs_one(program):
    def inputs(_):
        return [leaf(*shape) for shape in ((3, 7, 4), (4, 8), (4, 8), (8, 4))]

    (report,) = beside_eager(program, inputs, backward="last")
    looped = {region.pattern for region in report.regions}
    if program is step_that_is_compared:
        assert looped == {"mlp", "head"}
        return
    (refusal,) = report.refusals
    assert (looped, refusal.pattern, refusal.reason) == ({"head"}, "mlp", "UNKNOWN_OP")
    assert "aten.heaviside.default has no derivative" in refusal.text
