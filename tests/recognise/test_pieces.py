"""Pieces of logits that are read alike are joined; others are told."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F  # noqa: N812
from graphs import captured, rewritten, tensors
from numerics import looped

import mst_fx
from mst_fx.runtime.loop_operator import LoopSpec
from mst_fx.runtime.mini_sequence import CallSpec, mini_sequence

T, D, V = 32, 4, 32


def inputs():
    return [*tensors((T, D), (V, D)), torch.randint(0, V, (T,))]


def rewrite(program, **options):
    return rewritten(captured(lambda x, w, y: program(F.linear(x, w), y), *inputs()), **options)


def rows_by_row(logits, y):
    return sum(F.cross_entropy(z, t) for z, t in zip(logits.split(2), y.split(2), strict=True))


def test_many_pieces_make_one_loop_with_one_gradient_of_the_weight():
    gm, report = rewrite(rows_by_row)
    (region,) = report.regions
    assert region.backward == "recompute"
    (call,) = (node for node in gm.graph.nodes if node.target is mini_sequence)
    spec = CallSpec(*call.args[4])
    assert len(spec.wanted) == 2
    assert len(LoopSpec(*spec.forward_spec).outs) == 1  # the losses of all tokens
    assert not report.refusals


def test_small_logits_stay_in_pieces():
    gm = captured(lambda x, w, y: rows_by_row(F.linear(x, w), y), *inputs())
    after, report = rewritten(gm, min_bytes=1 << 30)
    assert after is gm
    assert not report.regions


def strided(logits, y):
    return [F.cross_entropy(logits[i::4], y[i::4]) * (i + 1) for i in (2, 0, 3, 1)]


def in_another_order(logits, y):
    return [F.cross_entropy(logits[i : i + 8], y[i : i + 8]) for i in (24, 8, 0)]


def scaled_row_by_row(logits, y):
    scales = (y[:, None] / V).double().split(8)
    return [
        F.cross_entropy(z * scales[3 - i], t) for i, (z, t) in enumerate(zip(logits.split(8), y.split(8), strict=True))
    ]


def read_twice(logits, y):
    nearest = [-z.logsumexp(-1).sum() for z in logits.split(8)]
    return nearest, [torch.where(z > 0, z, z * 2).logsumexp(-1).sum() for z in logits.split(8)]


def positions_of_all_sequences(logits, y):
    rows = [z.flatten(0, 1).logsumexp(-1) for z in logits.view(2, 16, V).split([4, 12], 1)]
    return rows, [z.flatten(0, 1).softmax(-1).square().sum() for z in logits.view(2, 16, V).split([4, 12], 1)]


def summed_in_other_dtypes(logits, y):
    pieces = logits.exp().split(16)
    counts = [(z > 1).sum((0, 1)) for z in pieces]
    return counts, [z.sum((1, 0), keepdim=True, dtype=torch.float32) for z in pieces]


def equal_values_of_which_one_is_written(logits, y):
    first, second, third, fourth = (logits[i : i + 16].exp().sum(-1) for i in (0, 0, 16, 16))
    first.add_(1)
    return first, second, third, fourth


def joined_twice_and_one_written(logits, y):
    pieces = [z.logsumexp(-1) for z in logits.split(8)]
    first, second = torch.cat(pieces), torch.cat(pieces)
    first.add_(1)
    return first, second, pieces


JOINED = [
    strided,
    in_another_order,
    scaled_row_by_row,
    read_twice,
    positions_of_all_sequences,
    summed_in_other_dtypes,
    equal_values_of_which_one_is_written,
    joined_twice_and_one_written,
]


@pytest.mark.parametrize("program", JOINED)
def test_pieces_that_are_joined_have_the_values_and_gradients_that_they_had(program):
    given = [x.detach().double().requires_grad_() if x.is_floating_point() else x for x in inputs()]
    gm = captured(lambda x, w, y: (program(F.linear(x, w), y), y + 1), *given)
    after, report = rewritten(gm, strict=True)
    assert len(report.regions) == 1
    assert not report.refusals
    for ours, eager in zip(results(after, given), results(gm, given), strict=True):
        torch.testing.assert_close(ours, eager)


def results(gm, given):
    """The values that a graph gives, and the gradients of all of them."""
    values = gm(*given)
    total = sum((value.double() * i).sum() for i, value in enumerate(values, 1) if value.requires_grad)
    return [*values, *torch.autograd.grad(total, given[:2])]


def test_values_of_pieces_have_memory_of_their_own():
    x, w, _ = inputs()
    after, _ = rewritten(captured(lambda x, w: [z.logsumexp(-1) for z in F.linear(x, w).split(8)], x, w))
    first, second, *_ = after(x, w)
    assert first.untyped_storage().data_ptr() != second.untyped_storage().data_ptr()


def test_a_sum_of_a_piece_is_rounded_once():
    """The sum of each row, 1027, is no number of bfloat16."""
    ones = torch.ones(T, 1, dtype=torch.bfloat16), torch.ones(1027, 1, dtype=torch.bfloat16)
    gm = captured(lambda x, w: [z.sum((0, 1)) for z in (F.linear(x, w) * 1).split(16)], *ones)
    after, report = rewritten(gm)
    assert len(report.regions) == 1
    assert all(map(torch.equal, after(*ones), gm(*ones)))


def test_of_two_projections_whose_pieces_meet_one_is_joined():
    def program(x, w, y):
        pieces = zip(F.linear(x, w).split(8), F.linear(x.flip(0), w).split(8), y.split(8), strict=True)
        return sum(F.cross_entropy(z + v, t) for z, v, t in pieces)

    _, report = rewritten(captured(program, *inputs()), strict=True)
    assert {refusal.reason for refusal in report.refusals} == {"AXIS_MIXED"}


def carried(logits, y):
    carry = 0.0
    for z in logits.split(8):
        carry = (z * 1.5 + carry).logsumexp(-1).mean()
    return carry


def read_in_two_ways(logits, y):
    return F.cross_entropy(logits[:12], y[:12]) + logits[12:].square().sum()


def scaled_apart(logits, y):
    return F.cross_entropy(torch.cat([z / (i + 1) for i, z in enumerate(logits.split(8))]), y)


def overlapping(logits, y):
    return logits[:20].logsumexp(-1).mean() + logits[12:].logsumexp(-1).mean()


def mixed(logits, y):
    return sum(z.softmax(0).square().mean() for z in logits.split(8))


def one_with_another(logits, y):
    return (logits[:16] - logits[16:]).logsumexp(-1).mean()


def one_with_another_and_back(logits, y):
    first, second = logits[:16].exp(), logits[16:].exp()
    return ((first / second).logsumexp(-1) + (second / first).logsumexp(-1)).mean()


def operands_in_other_places(logits, y):
    first, second, other = logits[:16].exp(), logits[16:].exp(), torch.arange(1.0, V + 1)
    return (
        torch.addcdiv(first, first, other).logsumexp(-1).mean() + torch.addcdiv(second, other, second).amax(-1).mean()
    )


def along_other_dims(logits, y):
    first, second = logits[:16, :16], logits[16:, :16]
    return first.logsumexp([0]).square().mean() + second.logsumexp([1]).square().mean()


def rows_of_another_dim(logits, y):
    return logits[:16].view(-1, 4, 8).logsumexp(-1).mean() + logits[16:].view(-1, 8, 4).logsumexp(-1).mean()


def other_class_weights(logits, y):
    weights = torch.arange(1.0, V + 1)
    return F.cross_entropy(logits[:16], y[:16], weights) + F.cross_entropy(logits[16:], y[16:], weights.flip(0))


def other_class_weights_summed(logits, y):
    weights = torch.arange(1.0, V + 1)
    first = F.cross_entropy(logits[:16], y[:16], weights, reduction="sum")
    return first + F.cross_entropy(logits[16:], y[16:], weights.flip(0), reduction="sum")


def scales_of_one_row_or_of_all(logits, y):
    scales = logits.detach().sigmoid()[:, :1]
    return (logits[:16] * scales[:16]).logsumexp(-1).mean() + (logits[16:] * scales[:1]).logsumexp(-1).mean()


def scales_of_other_dtypes(logits, y):
    scales = logits.detach().sigmoid()[:, :1]
    return (logits[:16] * scales[:16]).logsumexp(-1).mean() + (logits[16:] * scales[16:].double()).logsumexp(-1).mean()


def sequences_joined_in_another_order(logits, y):
    pieces = logits.view(2, 16, V).split(4, 1)
    return F.cross_entropy(torch.cat([z.flatten(0, 1) * 2 for z in pieces]), y)


def joined_in_another_order(logits, y):
    first, second = logits[:16] * 2, logits[16:] * 2
    return F.cross_entropy(torch.cat([second, first]), y)


def joined_along_the_classes(logits, y):
    first, second = logits[:16] * 2, logits[16:] * 2
    return F.cross_entropy(torch.cat([first, second], 1), y[:16])


APART = [
    carried,
    read_in_two_ways,
    scaled_apart,
    overlapping,
    mixed,
    one_with_another,
    one_with_another_and_back,
    operands_in_other_places,
    along_other_dims,
    rows_of_another_dim,
    other_class_weights,
    other_class_weights_summed,
    scales_of_one_row_or_of_all,
    scales_of_other_dtypes,
    sequences_joined_in_another_order,
    joined_in_another_order,
    joined_along_the_classes,
]


@pytest.mark.parametrize("program", APART)
def test_pieces_that_cannot_be_joined_stay_as_they_are_and_are_told(program):
    gm = captured(lambda x, w, y: program(F.linear(x, w), y), *inputs())
    after, report = rewritten(gm, strict=True)
    assert after is gm
    assert {refusal.reason for refusal in report.refusals} == {"AXIS_MIXED"}


def test_a_cut_at_a_place_that_varies_is_no_piece():
    """Where it ends is not known; it still moves in front of the projection."""

    def program(x, w, y, start):
        logits = F.linear(x, w)
        return F.cross_entropy(logits[start:], y[start:])

    before, compiled = len(mst_fx.reports()), looped(program, strict=True)
    for start in (3, 5, 7):
        given = [*inputs(), start]
        torch.testing.assert_close(compiled(*given), program(*given))
    assert [len(report.regions) for report in mst_fx.reports()[before:]] == [1, 1]  # 3, then any
