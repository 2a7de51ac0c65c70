"""Placements through whole graphs: demands, sums, refusals, composite axes."""

import pytest
import torch
from looping import Call, accepted_axes, aten_graph, indices, looped, placeholders, returned, values

from mst_fx.capture.decompositions import decompositions
from mst_fx.core.refusal import Reason, Refusal
from mst_fx.placement.placement import PARTIAL, WHOLE, Split
from mst_fx.placement.propagate import propagate
from mst_fx.placement.rules import Spans
from mst_fx.verify.by_chunks import EXACT

aten = torch.ops.aten
B, S, D, V = 3, 4, 6, 5
STREAM, HEAD, LABELS = values(B, S, D), values(V, D), indices(B, S, below=V)


def propagated(function, *inputs, split, table=None):
    """Placements of the operands, and of the results ("epilogue" for what runs after the loop)."""
    module = aten_graph(Call(function, inputs), table)
    operands = placeholders(module)
    placements = propagate(module.graph, {operands[0]: split})
    results = ["epilogue" if node in placements.epilogue else placements.of[node] for node in returned(module)]
    return [placements.of[node] for node in operands], results


def refusal(function, *inputs, table=None):
    with pytest.raises(Refusal) as refused:
        propagated(function, *inputs, split=Split(0), table=table)
    return refused.value


def loops_exactly(function, *inputs, split, position=0):
    """Whether the split is accepted; it must then give the same for every chunk length."""
    call = Call(function, inputs)
    module = aten_graph(call, decompositions())
    found = list(accepted_axes(module, placeholders(module)[position], split))
    for stages in found:
        for chunk in range(1, stages.length + 1):
            torch.testing.assert_close(looped(module, stages, inputs, chunk), [function(*inputs)], **EXACT)
    return bool(found)


def cross_entropy(x, w, labels):
    return torch.nn.functional.cross_entropy((x @ w.t()).view(-1, V), labels.view(-1))


# demands


@pytest.mark.parametrize(
    ("brought", "expected"),
    [
        (lambda y: y.view(-1, 1).view(B, S, 1), Split(1)),
        (lambda y: y.unsqueeze(-1), Split(1)),
        (lambda y: y.unsqueeze(-1).expand(B, S, D), Split(1)),
        (lambda y: y.to(torch.float32).unsqueeze(2), Split(1)),
        (lambda y: (y > 0).unsqueeze(-1), Split(1)),
        (lambda y: y.unsqueeze(0).transpose(1, 2).permute(2, 1, 0), Split(1)),
        (lambda y: (y * 2 + y.exp()).unsqueeze(-1), Split(1)),
    ],
)
def test_a_demand_goes_back_to_the_operand(brought, expected):
    labels = values(B, S)
    operands, results = propagated(lambda x, y: x * brought(y), STREAM, labels, split=Split(1))
    assert operands == [Split(1), expected]
    assert results == [Split(1)]
    assert loops_exactly(lambda x, y: x * brought(y), STREAM, labels, split=Split(1))


def test_a_demand_goes_back_through_a_transposition():
    operands, _ = propagated(lambda x, y: x + y.t(), values(4, 6), values(6, 4), split=Split(0))
    assert operands == [Split(0), Split(1)]


def test_a_demand_goes_back_through_merged_dims():
    operands, results = propagated(lambda x, y: x.view(B * S, D) + y, STREAM, values(B * S, 1), split=Split(1))
    assert operands == [Split(1), Split(0, outer=B)]
    assert results == [Split(0, outer=B)]


def test_labels_are_split_with_the_scores():
    operands, results = propagated(cross_entropy, STREAM, HEAD, LABELS, split=Split(1), table=decompositions())
    assert operands == [Split(1), WHOLE, Split(1)]
    assert results == [PARTIAL]  # the count of labels is known before the loop
    assert loops_exactly(cross_entropy, STREAM, HEAD, LABELS, split=Split(1))


def test_a_gathered_index_is_split_with_its_source():
    def picked(x, labels):
        return x.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)

    operands, results = propagated(picked, STREAM, LABELS, split=Split(1))
    assert operands == [Split(1), Split(1)]
    assert results == [Split(1)]


def test_an_expanded_operand_is_made_in_parts():
    operands, results = propagated(lambda x, y: x * y.expand(S, D), values(S, D), values(1, D), split=Split(0))
    assert operands == [Split(0), WHOLE]
    assert results == [Split(0)]


def test_a_value_needed_whole_and_split_is_refused():
    found = refusal(lambda x, w: (x + w).mm(w), values(4, 4), values(4, 4))
    assert found.reason is Reason.AXIS_MIXED


def test_a_value_needed_split_in_two_ways_is_refused():
    found = refusal(lambda x, y: (x + y) + (x + y.t()), values(4, 4), values(4, 4))
    assert found.reason is Reason.AXIS_MIXED


def test_a_demand_on_a_mixing_op_is_refused():
    found = refusal(lambda x, y: x + y.cumsum(0), values(4, 4), values(4, 4))
    assert found.reason is Reason.AXIS_MIXED


def test_a_demand_on_positions():
    positioned = lambda x: x + torch.arange(4).unsqueeze(1)  # noqa: E731
    assert propagated(positioned, values(4, 3), split=Split(0)) == ([Split(0)], [Split(0)])
    assert loops_exactly(positioned, values(4, 3), split=Split(0))


def test_a_demand_on_a_slice():
    def shifted(x, y):
        return x * y[:, 1:].unsqueeze(-1)

    labels = values(B, S + 1)
    operands, results = propagated(shifted, STREAM, labels, split=Split(1))
    assert (operands, results) == ([Split(1), WHOLE], [Split(1)])
    assert loops_exactly(shifted, STREAM, labels, split=Split(1))


def test_an_expanded_operand_is_not_split_another_way():
    # the row is repeated along the axis for one user and cut along it for the other
    def both(x, row):
        return (x + row.expand(4, 4)) * 2, (x.t() + row)

    with pytest.raises(Refusal):
        propagated(both, values(4, 4), values(1, 4), split=Split(0))


# sums over the axis


def test_what_reads_a_sum_runs_after_the_loop():
    def root_of_squares(x):
        return x.square().sum().sqrt()

    module = aten_graph(Call(root_of_squares, [STREAM]))
    placements = propagate(module.graph, {placeholders(module)[0]: Split(1)})
    assert [node.target for node in placements.epilogue] == [aten.sqrt.default]
    assert placements.of[placements.epilogue[0].args[0]] == PARTIAL
    assert loops_exactly(root_of_squares, STREAM, split=Split(1))


LINEAR = [
    lambda x, w: x.sum((0, 1)) / w.sum(),
    lambda x, w: -(x.sum((0, 1)) * w.sum()).view(2, 3) * 2.0,
    lambda x, w: x.sum((0, 1)) - 2 * x.square().sum((0, 1)),
    lambda x, w: torch.stack([x.sum((0, 1)), x.exp().sum((0, 1))])[1].sum() / 3,
    lambda x, w: torch.cat([x.sum((0, 1)), x.exp().sum((0, 1))])[2:].expand(2, -1).t(),
]
NOT_LINEAR = [
    lambda x, w: x.sum((0, 1)) + w,
    lambda x, w: w / x.sum((0, 1)),
    lambda x, w: x.sum((0, 1)) * x.sum((0, 1)),
    lambda x, w: x.sum((0, 1)) * x.exp().sum((0, 1)),
    lambda x, w: x.sum((0, 1)) / x.exp().sum((0, 1)),
    lambda x, w: torch.stack([x.sum((0, 1)), w]),
    lambda x, w: x.sum((0, 1)).to(torch.float32),
]


@pytest.mark.parametrize("function", LINEAR)
def test_a_sum_stays_one_through_linear_ops(function):
    assert propagated(function, STREAM, values(D), split=Split(1))[1] == [PARTIAL]
    assert loops_exactly(function, STREAM, values(D), split=Split(1))


@pytest.mark.parametrize("function", NOT_LINEAR)
def test_other_ops_wait_for_the_whole_sum(function):
    assert propagated(function, STREAM, values(D), split=Split(1))[1] == ["epilogue"]
    assert loops_exactly(function, STREAM, values(D), split=Split(1))


def test_a_sum_over_what_only_labels_make_is_known_before_the_loop():
    def masked(x, mask):
        return (x.sum(-1) * mask).sum() / (mask > 0).sum()

    module = aten_graph(Call(masked, [STREAM, values(B, S)]))
    placements = propagate(module.graph, {placeholders(module)[0]: Split(1)})
    sums = [node for node in module.graph.nodes if node.target == aten.sum.default]
    (count,) = (node for node in sums if node.meta["val"].dtype == torch.int64)
    assert placements.of[count] == WHOLE
    assert not placements.epilogue
    assert loops_exactly(masked, STREAM, values(B, S), split=Split(1))


def test_a_sum_of_large_values_is_not_taken_out_of_the_loop():
    def scaled(x, table):
        return (x.sum(-1) * table.exp().sum(-1)).sum() + table.exp().sum() * x.sum()

    module = aten_graph(Call(scaled, [STREAM, values(B, S, 9 * D)]))
    assert loops_exactly(scaled, STREAM, values(B, S, 9 * D), split=Split(1))
    placements = propagate(module.graph, {placeholders(module)[0]: Split(1)})
    sums = [node for node in module.graph.nodes if node.target == aten.sum.default and node in placements.of]
    assert WHOLE not in [placements.of[node] for node in sums]


def test_a_chain_after_a_sum_runs_after_the_loop():
    _, results = propagated(lambda x, w: (x.sum(0) + w).exp().sum(), values(4, 3), values(3), split=Split(0))
    assert results == ["epilogue"]
    assert loops_exactly(lambda x, w: (x.sum(0) + w).exp().sum(), values(4, 3), values(3), split=Split(0))


def test_a_mean_is_opened_into_a_sum():
    assert loops_exactly(lambda x: x.mean(), STREAM, split=Split(1))
    assert loops_exactly(lambda x: x.mean((0, 1)), STREAM, split=Split(1))
    assert refusal(lambda x: x.mean(), STREAM).reason is Reason.AXIS_MIXED  # as one op it is none


@pytest.mark.parametrize("centred", [lambda x: x - x.mean(0), lambda x: x / x.sum(), lambda x: x + x.t().mm(x)])
def test_two_passes_over_the_axis_are_refused(centred):
    assert refusal(centred, values(4, 4), table=decompositions()).reason is Reason.TWO_PASSES


def test_a_random_op_after_the_loop_is_refused():
    assert refusal(lambda x: torch.rand_like(x.sum(0)), values(4, 3)).reason is Reason.RANDOM


# ops that no region may hold


def test_an_op_without_a_rule_is_refused():
    found = refusal(lambda x: x.renorm(2, 0, 1.0), values(4, 3))
    assert found.reason is Reason.UNKNOWN_OP
    assert "renorm" in found.text


def test_an_op_without_a_rule_is_free_on_whole_values():
    _, results = propagated(lambda x, w: x * w.renorm(2, 0, 1.0), values(4, 3), values(1, 3), split=Split(0))
    assert results == [Split(0)]


@pytest.mark.parametrize("random", [torch.bernoulli, torch.rand_like, lambda x: torch.dropout(x, 0.5, True)])
def test_a_random_op_is_refused(random):
    # on some devices dropout decomposes into an empty_like and a bernoulli_; the reason is the draw all the same
    assert refusal(random, values(4, 3).sigmoid()).reason is Reason.RANDOM


def test_a_random_op_on_whole_values_is_refused():
    assert refusal(lambda x, w: x * torch.rand_like(w), values(4, 3), values(3)).reason is Reason.RANDOM


def test_an_op_that_writes_is_refused():
    assert refusal(lambda x: x.exp().add_(1), values(4, 3)).reason is Reason.MUTATION


def test_a_refusal_names_its_node():
    assert refusal(lambda x: x.exp().softmax(0), values(4, 3)).node.target == aten._softmax.default


# composite axes


def merge_and_back(x, w):
    y = x.view(-1, D).mm(w).relu()
    return y.view(x.shape[0], x.shape[1], -1)


@pytest.mark.parametrize(
    ("split", "merged"),
    [(Split(1), Split(0, outer=B)), (Split(0), Split(0, inner=S))],
)
def test_either_dim_of_a_merged_one_can_be_split(split, merged):
    w = values(D, 2)
    _, results = propagated(lambda x, w: x.view(-1, D).mm(w), STREAM, w, split=split)
    assert results == [merged]
    _, results = propagated(merge_and_back, STREAM, w, split=split)
    assert results == [split]
    assert loops_exactly(merge_and_back, STREAM, w, split=split)


@pytest.mark.parametrize(
    ("split", "seen"),
    [(Split(0, outer=B), Split(1)), (Split(0, inner=S), Split(0))],
)
def test_a_merged_stream_can_be_split_along_a_part(split, seen):
    def per_batch(x):
        return x.view(B, S, D).softmax(-1).view(-1, D)

    flat = STREAM.view(-1, D)
    _, results = propagated(lambda x: x.view(B, S, D), flat, split=split)
    assert results == [seen]
    assert loops_exactly(per_batch, flat, split=split)


def test_a_merged_stream_that_is_cut_as_one_spans_two_dims():
    with pytest.raises(Spans) as spans:
        propagated(lambda x: x.view(B, S, D), STREAM.view(-1, D), split=Split(0))
    assert spans.value.factors == [(1, S), (B, 1)]
    assert loops_exactly(lambda x: x.view(B, S, D).cumsum(0), STREAM.view(-1, D), split=Split(0))


def test_an_inner_factor_is_no_part_of_the_axis():
    # three batches of four merged, then viewed as two groups of six: no batch lies within one group
    x = values(3, 4, D)
    assert not loops_exactly(lambda x: x.view(12, D).view(2, 6, D) * 2, x, split=Split(0))
    # four batches of three: a group holds two batches
    x = values(4, 3, D)
    assert loops_exactly(lambda x: x.view(12, D).view(2, 6, D) * 2, x, split=Split(0))
